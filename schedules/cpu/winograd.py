"""Winograd convolution over frames and space, over lists of live tiles (`docs/winograd.md`).

A chunk of columns goes through three phases, each shared out over the threads:

1. inputs of live tiles are transformed: ``V[ξ][source row][channel]``;
2. for each of the ξ products and each panel of output channels, ``M[ξ][row][oc] = Σ_tap Σ_channel V · U``, the same
   register tile as the direct kernel's;
3. products are transformed back, bias, residual and activation applied, and live positions stored.

Depth taps are summed in the transformed domain where frames are not transformed themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from tvm import tirx

from ..emit import (
    FLOAT,
    INT,
    Expr,
    big,
    flat,
    lanes,
    let,
    number,
    parallel,
    read,
    scratch,
    serial,
    short,
    store,
    when,
    write,
)
from ..epilogue import activate_for
from ..geometry import Triple
from ..kernel import Count, Operand, Planned, Weights, channels_mask, constant
from .channel_plan import ChannelPlan
from .cost import transform_seconds
from .dead_outputs import zero_dead
from .linear_forms import along_axes
from .tiles import Machine
from .transform_weights import TransformWeights
from .winograd_multiply import Products
from .winograd_space import Transformed, unit_in
from .winograd_transforms import WinogradPanels, matrices


@dataclass(frozen=True)
class WinogradConv(Transformed):
    """One Winograd kernel; ``anew``: its weights are transformed in every call, and kept as the layer has them."""

    anew: bool = False
    exact = False

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        size = "x".join(str(m) for m in self.plan.m)
        step = f"_k{self.tile.step}" if self.tile.step > 1 else ""
        return f"conv3d_winograd_{size}{self.marks}_{short(self.dtype)}_mr{self.tile.mr}_nr{self.tile.nr}{step}"

    def describe(self) -> dict[str, Any]:
        """Also the tile of outputs, what skipping saves in one piece, and whether the lists see frames as clips."""
        return {**super().describe(), "tile": list(self.plan.m), "by_frame": self.plan.window != self.window}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the transformed weights: (ξ, vectors of output channels, taps, C_in, lanes)."""
        plan, floats = self.plan, self.tile.vector_floats
        return (plan.xi, -(-self.channels_out // floats), plan.taps, self.channels_in, floats)

    @property
    def weight_dtype(self) -> str:
        """Transformed values are float32, whatever the activations are: transforms magnify rounding."""
        return FLOAT

    @property
    def panelled(self) -> WinogradPanels:
        """How weights become what the kernel reads."""
        plan = self.plan
        return WinogradPanels(
            self.channels_out, self.channels_in, plan.window.kernel, plan.m, plan.transformed, self.tile.vector_floats
        )

    @property
    def growth(self) -> float:
        """What is transformed in every call is not kept."""
        return 1.0 if self.anew else super().growth

    @property
    def memory_bytes(self) -> int:
        """Also its weights where they lie in scratch."""
        return super().memory_bytes + (4 * math.prod(self.weight_shape) if self.anew else 0)

    @property
    def preparation(self) -> WinogradPanels | None:
        """None where no transformed weights are kept."""
        return None if self.anew else self.panelled

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Packed weights if they are kept, bias, and the taps."""
        planes = {"tap_planes": self.plan.tap_planes} if self.plan.thins_planes else {}
        return planes | super().prepare(replace(weights, weight=None) if self.anew and weights else weights)

    def operands(self) -> list[Operand]:
        """As every convolution; weights that are made in every call are a list."""
        made = {"weights"} if self.anew else set()
        return [replace(each, role="list") if each.name in made else each for each in super().operands()]

    def lists(self) -> list[Planned]:
        """Also what transforms weights in every call: last, as they take most memory."""
        return [*super().lists(), *([Planned(TransformWeights(self.panelled), ("weights",))] if self.anew else [])]

    def predict(
        self, machine: Machine, threads: int, shares: Sequence[float] | None = None, whole_units: bool = False
    ) -> float:
        """With the time that transforming weights in every call takes."""
        made = transform_seconds(4 * math.prod(self.weight_shape), machine, threads) if self.anew else 0.0
        return made + super().predict(machine, threads, shares, whole_units)

    def unpacked(self, at: Expr) -> None:
        """Transformed weights are none of the layer's."""

    @property
    def unit(self) -> int:
        """Input channels that are left out together: whole vectors of V, and whole rows of weights read where they are.

        Output channels are left out by the vector. Dead channels of a unit that is alive are zeros on either side.
        """
        return unit_in(self.tile.vector_floats)

    def channel_planner(self, axis: str, channels: int) -> ChannelPlan:
        """One sweep over the mask."""
        unit = self.unit if axis == "in_channels" else self.tile.vector_floats
        return ChannelPlan(self.plan.samples, channels, axis, unit)

    def channel_operands(self) -> list[Operand]:
        """Lists, then the masks that they were made of: those show the dead channels of units that are alive. Then the
        planes that dead frames leave."""
        masks = [
            channels_mask(name, axis, self.plan.samples, channels)
            for name, axis, on, channels in (
                ("alive_in", "in_channels", self.live_in, self.channels_in),
                ("alive_out", "out_channels", self.live_out, self.channels_out),
            )
            if on
        ]
        planes = [constant("tap_planes", self.plan.tap_planes.shape, INT)] if self.plan.thins_planes else []
        return [*super().channel_operands(), *masks, *planes]

    @property
    def masks_read(self) -> list[str]:
        """What is wanted of the output, and where frames are transformed what is alive of the input."""
        needed = {"out_frames", "positions"} | ({"in_frames"} if self.plan.transformed[0] else set())
        return [key for key in self.plan.masks if key in needed]

    def work(self) -> tuple[Count, Count, Count]:
        """A pair of row and tap is one of each of the ξ products, a pair of row and plane one of those of its plane."""
        of_pair = self.plan.xi // (self.plan.alpha[0] if self.plan.thins_planes else 1)
        return Count(of_pair, "pairs", (0,)), *super().work()[1:]

    def multiplied(self, args: Mapping[str, tirx.Buffer], sources: tirx.Buffer, products: tirx.Buffer) -> Products:
        """What emits the products of ``sources`` (V) as ``products`` (M)."""
        return Products(self, args, flat(args["weights"]), sources, products)

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Chunk by chunk, three phases each."""
        WinogradEmitter(self, args).emit()


@dataclass(frozen=True)
class Results:
    """What a tile's results are of: the clip, where the tile begins, the first channel, the bias and which channels are
    alive (None: all) of ``count``; ``read``: which of them are read, not 0 (None: all that lie inside the clip)."""

    clip: Expr
    starts: Sequence[Expr]
    first: Expr
    bias: Expr
    alive: Expr | None
    count: int
    read: tirx.Buffer | None


class WinogradEmitter:
    """The kernel's phases, from its signature down to the multiply-add."""

    def __init__(self, conv: WinogradConv, args: Mapping[str, tirx.Buffer]) -> None:
        self.conv, self.plan, self.tile, self.window = conv, conv.plan, conv.tile, conv.plan.window
        self.args = args
        self.bias, self.columns, self.inputs = args["bias"], args["columns"], args["inputs"]
        self.rows_out, self.counts = args["rows_out"], args["counts"]
        self.x, self.y = flat(args["x"]), flat(args["y"])
        self.residual = flat(args["residual"]) if conv.residual else None
        #: Outputs of the convolution under one of the kernel's, along each axis.
        self.step: Triple = (1, 1, 1)

    def emit(self) -> None:
        """Zeros where nothing is computed but somebody reads, then chunk by chunk."""
        if self.conv.zero_dead:
            zero_dead(self.conv, self.args, self.y, self.step)
        self._each_chunk(None, self._transform_outputs)

    def _each_chunk(self, tasks: Expr | None, write_outputs: Callable[[Expr, Expr], None]) -> None:
        """Three phases; ``write_outputs(chunk, task)`` is the last, of so many ``tasks``, or one for each row."""
        conv, plan = self.conv, self.plan
        self.sources = scratch((plan.xi * conv.source_plane,))
        self.products = scratch((plan.xi * conv.product_plane,))
        multiply = self.multiply = conv.multiplied(self.args, self.sources, self.products)
        with serial(self.counts[plan.chunks, 0]) as chunk:
            with parallel(self.counts[chunk, 0]) as index:
                self._transform_inputs(chunk, index)
            panels = multiply.most_panels
            with parallel(panels * plan.xi) as task:
                xi, panel = let(tirx.floordiv(task, panels)), let(tirx.floormod(task, panels))
                multiply.multiply_panel(chunk, xi, panel)
            with parallel(self.counts[chunk, 1] * self.tile.mr if tasks is None else tasks) as task:
                write_outputs(chunk, task)

    # -- channels ----------------------------------------------------------------------------------------------------

    def _each_vector(self, count: Expr, visit: Callable[[Expr, int], None]) -> None:
        """Call ``visit(first channel, lanes)`` over ``count`` channels: whole vectors, then the rest one by one."""
        floats = self.tile.vector_floats
        whole = count // floats if isinstance(count, int) else let(tirx.floordiv(count, floats))
        if not isinstance(count, int) or whole:
            with serial(whole) as vector:
                visit(let(vector * floats), floats)
        if not isinstance(count, int) or count % floats:
            with serial(count - whole * floats) as rest:
                visit(let(whole * floats + rest), 1)

    def _named(self, side: str, sample: Expr, channel: Expr, count: int) -> tuple[Expr, Expr]:
        """Of the ``channel``-th one listed and those behind it: the first, and which are alive, not 0 (None: all).

        Lists are of whole vectors, so that ``count`` channels listed side by side are side by side among all.
        """
        listed = self.args.get(f"{side}_channels")
        if listed is None:
            return channel, None
        first = let(listed[sample, 1 + channel])
        return first, let(self.args[f"alive_{side}"][sample, lanes(first, count)])

    # -- phase 1 -----------------------------------------------------------------------------------------------------

    def _transform_inputs(self, chunk: Expr, index: Expr) -> None:
        """One tile of the input, all live channels."""
        conv, plan, window = self.conv, self.plan, self.window
        row = let(self.inputs[chunk, index])
        frame, local = let(tirx.floordiv(row, plan.most_columns)), let(tirx.floormod(row, plan.most_columns))
        column = let(self.columns[chunk, local])
        clip, place = let(tirx.floordiv(column, plan.places)), let(tirx.floormod(column, plan.places))
        sample = let(plan.sample_of(clip))
        tile = (frame, let(tirx.floordiv(place, plan.tiles[2])), let(tirx.floormod(place, plan.tiles[2])))
        starts = [self._first_input(axis, tile[axis]) for axis in range(3)]
        axes = [axis for axis in range(3) if plan.transformed[axis]]
        waiting = scratch((plan.xi * self.tile.vector_floats,))
        target = let(big(index if plan.one_source else row) * conv.channels_in)
        readable = self._readable(clip, starts)

        def channels(channel: Expr, count: int) -> None:
            first, alive = self._named("in", sample, channel, count)

            def value_at(place: list[Expr]) -> Expr:
                at = [start + offset for start, offset in zip(starts, place, strict=True)]
                inside = self._is_read(readable, at, place)
                position = ((clip * window.size[0] + at[0]) * window.size[1] + at[1]) * window.size[2] + at[2]
                value = read(self.x, big(position) * conv.channels_in + first, count)
                if alive is not None:
                    value = tirx.Select(alive != number(0.0, count), value, number(0.0, count))
                return tirx.if_then_else(tirx.all(*inside), value, number(0.0, count)) if inside else value

            def transformed(at: Expr, value: Expr) -> None:
                store(self.sources, value, lanes(big(at) * conv.source_plane + target + channel, count))

            self._along_axes(axes[::-1], 2, value_at, transformed, waiting, count)

        self._each_vector(self.multiply.live_in(sample), channels)

    def _is_read(self, readable: tirx.Buffer | None, at: Sequence[Expr], place: Sequence[Expr]) -> list[Expr]:
        """On what it depends whether the input ``at`` a position, ``place`` in its tile, is read or counts as zero."""
        inside = [
            tirx.all(at[axis] >= 0, at[axis] < self.window.size[axis])
            for axis in (1, 2)
            if self._may_leave(axis, place[axis])
        ]
        return inside if readable is None else [*inside, readable[place[0]] != 0]

    def _readable(self, clip: Expr, starts: Sequence[Expr]) -> tirx.Buffer | None:
        """For each frame of a tile of inputs that begins at ``starts``: 1 if it is inside the clip, alive and read;
        None where frames are not transformed.

        The others count as zeros. A frame that no live output frame reads may never have been written.
        """
        if not self.plan.transformed[0]:
            return None
        window, frames, start = self.window, self.plan.alpha[0], starts[0]
        readable = scratch((frames,), INT)
        with serial(frames) as offset:
            source = let(start + offset)
            reasons = [source >= 0, source < window.size[0]]
            if "in_frames" in self.args:
                safe = tirx.max(tirx.min(source, window.size[0] - 1), 0)
                reasons.append(self.args["in_frames"][clip, safe] != number(0.0))
            if "out_frames" in self.args:
                reasons.append(tirx.any(*(self._is_live(clip, source + window.padding[0] - tap) for tap in range(3))))
            store(readable, tirx.Cast(INT, tirx.all(*reasons)), offset)
        return readable

    def _is_live(self, clip: Expr, frame: Expr) -> Expr:
        """Whether ``frame`` is an output frame that is read."""
        last = self.window.out[0] - 1
        alive = self.args["out_frames"][clip, tirx.max(tirx.min(frame, last), 0)] != number(0.0)
        return tirx.all(frame >= 0, frame <= last, alive)

    def _first_input(self, axis: int, index: Expr) -> Expr:
        """Where along ``axis`` a tile of inputs begins. Frames that are not transformed are listed as they lie."""
        if axis == 0 and not self.plan.transformed[0]:
            return index
        return let(index * self.plan.input_step(axis) - self.window.padding[axis])

    def _may_leave(self, axis: int, offset: Expr) -> bool:
        """Whether some tile's input at ``offset`` along ``axis`` lies outside the clip."""
        plan, window = self.plan, self.window
        if not isinstance(offset, int):
            return True
        last = (plan.tiles[axis] - 1) * plan.input_step(axis) - window.padding[axis] + offset
        return offset < window.padding[axis] or last >= window.size[axis]

    def _matrix(self, which: int, axis: int) -> np.ndarray:
        """``Bᵀ`` for inputs, ``Aᵀ`` for outputs."""
        return matrices(self.plan.m[axis], 3)[which]

    def _along_axes(
        self,
        axes: Sequence[int],
        which: int,
        read: Callable[[list[Expr]], Expr],
        write: Callable[[Expr, Expr], None],
        waiting: tirx.Buffer,
        count: int,
    ) -> None:
        """Transform a tile along ``axes``; ``which`` picks the matrices: 2 those of inputs, 0 those of outputs."""
        used = {axis: self._matrix(which, axis) for axis in axes}
        along_axes(used, self.plan.alpha, read, write, waiting, count)

    # -- phase 3 -----------------------------------------------------------------------------------------------------

    def _transform_outputs(self, chunk: Expr, slot: Expr) -> None:
        """One tile of the output, all live channels."""
        mr = self.tile.mr
        row = let(self.rows_out[chunk, tirx.floordiv(slot, mr), tirx.floormod(slot, mr)])
        with when(row >= 0):
            self._transform_output(chunk, slot, row)

    def _transform_output(self, chunk: Expr, slot: Expr, row: Expr) -> None:
        conv, plan, tile = self.conv, self.plan, self.tile
        frame, local = let(tirx.floordiv(row, plan.most_columns)), let(tirx.floormod(row, plan.most_columns))
        column = let(self.columns[chunk, local])
        clip, place = let(tirx.floordiv(column, plan.places)), let(tirx.floormod(column, plan.places))
        sample = let(plan.sample_of(clip))
        index = (frame, tirx.floordiv(place, plan.tiles[2]), tirx.floormod(place, plan.tiles[2]))
        starts = [let(i * m) for i, m in zip(index, plan.m, strict=True)]
        axes = [axis for axis in range(3) if plan.transformed[axis]]
        waiting = scratch((plan.xi * tile.vector_floats,))
        source = let(big(slot) * (conv.panels * tile.nr))
        alpha, stored = plan.alpha, self._read_results(clip, starts)

        def channels(channel: Expr, count: int) -> None:
            first, alive = self._named("out", sample, channel, count)
            bias = let(self.bias[lanes(first, count)])

            def product_at(at: list[Expr]) -> Expr:
                xi = (at[0] * alpha[1] + at[1]) * alpha[2] + at[2]
                return self.products[lanes(big(xi) * conv.product_plane + source + channel, count)]

            of = Results(clip, starts, first, bias, alive, count, stored)
            self._along_axes(axes, 0, product_at, partial(self._result, of, waiting), waiting, count)
            self._end_tile(of, waiting)

        self._each_vector(self.multiply.live_out(sample), channels)

    def _result(self, of: Results, waiting: tirx.Buffer, at: Expr, value: Expr) -> None:
        """One of a tile's, at a place in it as :meth:`_along_axes` counts them."""
        out, coordinates = self.window.out, self._coordinates(of, at)
        inside = self._inside(coordinates) if of.read is None else [of.read[at] != 0]
        with when(tirx.all(*inside) if inside else tirx.IntImm("bool", 1)):
            position = ((of.clip * out[0] + coordinates[0]) * out[1] + coordinates[1]) * out[2]
            target = let(big(position + coordinates[2]) * self.conv.channels_out + of.first)
            value = let(value + of.bias)
            if self.residual is not None:
                value = value + read(self.residual, target, of.count)
            write(self.y, self._finished(of, value), target, of.count)

    def _coordinates(self, of: Results, at: Expr) -> list[Expr]:
        """Where a result lies in its clip."""
        alpha = self.plan.alpha
        offsets = (
            tirx.floordiv(at, alpha[1] * alpha[2]),
            tirx.floormod(tirx.floordiv(at, alpha[2]), alpha[1]),
            tirx.floormod(at, alpha[2]),
        )
        return [let(start + offset) for start, offset in zip(of.starts, offsets, strict=True)]

    def _inside(self, at: Sequence[Expr]) -> list[Expr]:
        """What must hold for output position ``at`` to lie inside the clip."""
        out = self.window.out
        return [at[axis] < out[axis] for axis in range(3) if out[axis] % self.plan.m[axis]]

    def _finished(self, of: Results, value: Expr) -> Expr:
        """After the activation; zeros where channels are dead."""
        value = activate_for(str(self.y.dtype), self.conv.activation, value, of.count)
        if of.alive is None:
            return value
        return tirx.Select(of.alive != number(0.0, of.count), value, number(0.0, of.count))

    def _end_tile(self, of: Results, waiting: tirx.Buffer) -> None:
        """Nothing is left to do once each result has been seen."""

    def _read_results(self, clip: Expr, starts: Sequence[Expr]) -> tirx.Buffer | None:
        """Of each result of a tile that begins at ``starts``, by its place: 1 if it lies inside the clip and is read.
        Looked up once for all channels; None where masks leave all."""
        plan, out = self.plan, self.window.out
        frames = "out_frames" in self.args and plan.transformed[0]
        if plan.positions is None and not frames:
            return None
        found = scratch((plan.xi,), "int8")
        with serial(plan.m[0]) as frame, serial(plan.m[1]) as row, serial(plan.m[2]) as column:
            at = [let(start + offset) for start, offset in zip(starts, (frame, row, column), strict=True)]
            safe = [let(tirx.min(place, extent - 1)) for place, extent in zip(at, out, strict=True)]
            read = self._inside(at)
            if frames:
                read.append(self.args["out_frames"][clip, safe[0]] != number(0.0))
            if plan.positions is not None:
                sample, named = (
                    index if extent > 1 else 0 for index, extent in zip((clip, safe[0]), plan.positions, strict=True)
                )
                read.append(self.args["positions"][sample, named, safe[1], safe[2]] != number(0.0))
            place = (frame * plan.alpha[1] + row) * plan.alpha[2] + column
            store(found, tirx.Cast("int8", tirx.all(*read)), place)
        return found
