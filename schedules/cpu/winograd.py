"""Winograd convolution over frames and space, over lists of live tiles (`docs/winograd.md`).

A chunk of columns goes through three phases, each shared out over the threads:

1. inputs of live tiles are transformed: ``V[ξ][source row][channel]``;
2. for each of the ξ products and each panel of output channels, ``M[ξ][row][oc] = Σ_tap Σ_channel V · U``, the same
   register tile as the direct kernel's;
3. products are transformed back, bias, residual and activation applied, and live positions stored.

Depth taps are summed in the transformed domain where frames are not transformed themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tvm import tirx

from ..convolution import Convolution
from ..emit import (
    FLOAT,
    INT,
    Expr,
    big,
    ceil_div,
    choose,
    flat,
    lane,
    lanes,
    let,
    number,
    parallel,
    prefetch,
    read,
    scratch,
    serial,
    short,
    splat,
    store,
    when,
    write,
)
from ..epilogue import activate
from ..kernel import Count
from .channel_plan import ChannelPlan
from .dead_outputs import zero_dead
from .panel_weights import PanelWeights, WeightPanel
from .tiles import Tile
from .winograd_plan import WinogradPlan
from .winograd_transforms import WinogradPanels, matrices

#: Floats between the ξ planes of a scratch buffer beyond their content: planes a power of two apart would share the
#: few lines of one cache set.
PLANE_SKEW = 16
#: Floats of a cache line: one prefetch for each is enough.
LINE_FLOATS = 16


@dataclass(frozen=True)
class WinogradConv(Convolution):
    """One Winograd kernel, of one convolution group.

    Of ``tile``, the register tile (``mr``, ``vectors``, ``vector_floats``, ``step``) and the cache blocking of the sum
    (``segment_taps``, ``depth_block``) are used.
    """

    exact = False
    tile: Tile
    plan: WinogradPlan

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        size = "x".join(str(m) for m in self.plan.m)
        step = f"_k{self.tile.step}" if self.tile.step > 1 else ""
        return f"conv3d_winograd_{size}{self.marks}_{short(self.dtype)}_mr{self.tile.mr}_nr{self.tile.nr}{step}"

    def describe(self) -> dict[str, Any]:
        """Also the tile of outputs: what skipping saves in one piece."""
        return {**super().describe(), "tile": list(self.plan.m)}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the transformed weights: (ξ, panels, taps, C_in, nr)."""
        plan = self.plan
        return (plan.xi, self.panels, plan.taps, self.channels_in, self.tile.nr)

    @property
    def weight_dtype(self) -> str:
        """Transformed values are float32, whatever the activations are: transforms magnify rounding."""
        return FLOAT

    @property
    def panelled(self) -> WinogradPanels:
        """How weights become what the kernel reads."""
        plan = self.plan
        return WinogradPanels(
            self.channels_out, self.channels_in, plan.window.kernel, plan.m, plan.transformed, self.tile.nr
        )

    def unpacked(self, at: Expr) -> None:
        """Transformed weights are none of the layer's."""

    def channel_planner(self, axis: str, channels: int) -> ChannelPlan:
        """One sweep over the mask."""
        return ChannelPlan(self.plan.samples, channels, axis)

    @property
    def masks_read(self) -> list[str]:
        """What is wanted of the output, and where frames are transformed what is alive of the input."""
        needed = {"out_frames", "positions"} | ({"in_frames"} if self.plan.transformed[0] else set())
        return [key for key in self.plan.masks if key in needed]

    def work(self) -> tuple[Count, Count, Count]:
        """A pair of row and tap is one of each of the ξ products."""
        return Count(self.plan.xi, "pairs", (0,)), *super().work()[1:]

    @property
    def source_plane(self) -> int:
        """Floats of one ξ plane of V."""
        return self.plan.source_rows * self.channels_in + PLANE_SKEW

    @property
    def product_plane(self) -> int:
        """Floats of one ξ plane of M."""
        return self.plan.tiles_capacity * self.tile.mr * self.panels * self.tile.nr + PLANE_SKEW

    @property
    def scratch_bytes(self) -> int:
        """Memory of V and M."""
        return 4 * self.plan.xi * (self.source_plane + self.product_plane)

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Chunk by chunk, three phases each."""
        _Emitter(self, args).emit()


@dataclass(frozen=True)
class ChannelVector:
    """``count`` channels that a vector holds: consecutive ones from the ``first`` on.

    If they are ``apart``, they are only where ``side_by_side`` says so.
    """

    first: Expr
    count: int
    apart: tuple[Expr, ...] = ()
    side_by_side: Expr = None

    @classmethod
    def live(cls, listed: tirx.Buffer | None, sample: Expr, first: Expr, count: int) -> ChannelVector:
        """``count`` live channels from the ``first`` on: of the sample's list, or of all where there is none.

        Whether listed channels, which ascend, are side by side is found out when the kernel runs.
        """
        if listed is None:
            return cls(first, count)
        channels = tuple(let(listed[sample, 1 + first + index]) for index in range(count))
        if count == 1:
            return cls(channels[0], 1)
        return cls(channels[0], count, channels, let(channels[-1] - channels[0] == count - 1))

    def read(self, buffer: tirx.Buffer, start: Expr) -> Expr:
        """The channels' values, the first of all channels lying at ``start``."""
        together = read(buffer, start + self.first, self.count)
        if not self.apart:
            return together
        values = [read(buffer, start + channel) for channel in self.apart]
        return tirx.if_then_else(self.side_by_side, together, tirx.Shuffle(values, list(range(self.count))))

    def write(self, put: Callable[[Expr, Expr, int], None], value: Expr) -> None:
        """Call ``put(value, first channel, how many)`` once where they are side by side, else for each."""
        if not self.apart:
            put(value, self.first, self.count)
            return

        def each() -> None:
            for index, channel in enumerate(self.apart):
                put(lane(value, index), channel, 1)

        choose(self.side_by_side, lambda: put(value, self.first, self.count), each)


class _Emitter:
    """The kernel's phases, from its signature down to the multiply-add."""

    def __init__(self, conv: WinogradConv, args: Mapping[str, tirx.Buffer]) -> None:
        self.conv, self.plan, self.tile, self.window = conv, conv.plan, conv.tile, conv.window
        self.args = args
        self.in_channels: Any = args.get("in_channels")
        self.out_channels: Any = args.get("out_channels")
        self.bias, self.taps = args["bias"], args["tap_entries"]
        self.columns, self.inputs, self.runs = args["columns"], args["inputs"], args["runs"]
        self.rows_in, self.rows_out, self.counts = args["rows_in"], args["rows_out"], args["counts"]
        self.x, self.y = flat(args["x"]), flat(args["y"])
        lists = (self.in_channels, self.out_channels)
        self.panel_weights = PanelWeights(flat(args["weights"]), self.tile, self.plan.taps, conv.channels_in, *lists)
        self.residual = flat(args["residual"]) if conv.residual else None

    def emit(self) -> None:
        conv, plan = self.conv, self.plan
        if conv.zero_dead:
            zero_dead(conv, self.args, self.y)
        self.sources = scratch((plan.xi * conv.source_plane,))
        self.products = scratch((plan.xi * conv.product_plane,))
        with serial(self.counts[plan.chunks, 0]) as chunk:
            sample = let(self.counts[chunk, 3])
            with parallel(self.counts[chunk, 0]) as index:
                self._transform_inputs(chunk, sample, index)
            panels = self.panel_weights.live_panels(sample, conv.panels)
            with parallel(panels * plan.xi) as task:
                self._multiply_panel(chunk, sample, let(tirx.floordiv(task, panels)), let(tirx.floormod(task, panels)))
            with parallel(self.counts[chunk, 1] * self.tile.mr) as slot:
                self._transform_outputs(chunk, sample, slot)

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

    # -- phase 1 -----------------------------------------------------------------------------------------------------

    def _transform_inputs(self, chunk: Expr, sample: Expr, index: Expr) -> None:
        """One tile of the input, all live channels."""
        conv, plan, window = self.conv, self.plan, self.window
        row = let(self.inputs[chunk, index])
        frame, local = let(tirx.floordiv(row, plan.columns)), let(tirx.floormod(row, plan.columns))
        column = let(self.columns[chunk, local])
        clip, place = let(tirx.floordiv(column, plan.places)), let(tirx.floormod(column, plan.places))
        tile = (frame, let(tirx.floordiv(place, plan.tiles[2])), let(tirx.floormod(place, plan.tiles[2])))
        starts = [self._first_input(axis, tile[axis]) for axis in range(3)]
        axes = [axis for axis in range(3) if plan.transformed[axis]]
        waiting = scratch((plan.xi * self.tile.vector_floats,))
        target = let(big(row) * conv.channels_in)
        readable = self._readable_frames(clip, starts[0]) if plan.transformed[0] else None
        listed = self.in_channels if conv.live_in else None

        def channels(channel: Expr, count: int) -> None:
            together = ChannelVector.live(listed, sample, channel, count)

            def value_at(place: list[Expr]) -> Expr:
                at = [start + offset for start, offset in zip(starts, place, strict=True)]
                inside = [
                    tirx.all(at[axis] >= 0, at[axis] < window.size[axis])
                    for axis in (1, 2)
                    if self._may_leave(axis, place[axis])
                ]
                if readable is not None:
                    inside.append(readable[place[0]] != 0)
                position = ((clip * window.size[0] + at[0]) * window.size[1] + at[1]) * window.size[2] + at[2]
                value = together.read(self.x, big(position) * conv.channels_in)
                return tirx.if_then_else(tirx.all(*inside), value, number(0.0, count)) if inside else value

            def transformed(at: Expr, value: Expr) -> None:
                store(self.sources, value, lanes(big(at) * conv.source_plane + target + channel, count))

            self._along_axes(axes[::-1], 2, value_at, transformed, waiting, count)

        self._each_vector(self.panel_weights.live_in(sample), channels)

    def _readable_frames(self, clip: Expr, start: Expr) -> tirx.Buffer:
        """For each frame of a tile of inputs that begins at ``start``: 1 if it is inside the clip, alive and read.

        The others count as zeros. A frame that no live output frame reads may never have been written.
        """
        window, frames = self.window, self.plan.alpha[0]
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

    def _along_axes(
        self,
        axes: list[int],
        which: int,
        read: Callable[[list[Expr]], Expr],
        write: Callable[[Expr, Expr], None],
        waiting: tirx.Buffer,
        count: int,
    ) -> None:
        """Transform a tile along ``axes`` in turn, lines between the first and the last axis in ``waiting``.

        ``which`` picks the matrix: 2 for Bᵀ, 0 for Aᵀ. The first axis reads by ``read(place)``; the last one writes by
        ``write(place in the tile, value)``, a place being counted over α whatever has been reduced to m.
        """
        alpha = self.plan.alpha
        stride = (alpha[1] * alpha[2], alpha[2], 1)
        for position, axis in enumerate(axes):
            matrix = matrices(self.plan.m[axis], 3)[which]
            done = set(axes[:position]) if which == 0 else set()
            others = [other for other in range(3) if other != axis]
            extents = [self.plan.m[other] if other in done else alpha[other] for other in others]
            with serial(extents[0]) as i, serial(extents[1]) as j:
                place: list[Expr] = [0, 0, 0]
                for other, extent, index in zip(others, extents, (i, j), strict=True):
                    place[other] = 0 if extent == 1 else index
                base = let(sum((place[other] * stride[other] for other in others), start=tirx.IntImm(INT, 0)))
                line = []
                for offset in range(matrix.shape[1]):
                    place[axis] = offset
                    if position == 0:
                        line.append(let(read(list(place))))
                    else:
                        line.append(let(waiting[lanes((base + offset * stride[axis]) * count, count)]))
                for offset, value in enumerate(linear(matrix, line, count)):
                    at = base + offset * stride[axis]
                    if position == len(axes) - 1:
                        write(at, value)
                    else:
                        store(waiting, value, lanes(at * count, count))

    # -- phase 2 -----------------------------------------------------------------------------------------------------

    def _multiply_panel(self, chunk: Expr, sample: Expr, xi: Expr, panel: Expr) -> None:
        """One ξ, one panel of output channels, all rows of the chunk."""
        panels = self.panel_weights
        plane = let(big(xi) * (self.conv.panels * panels.panel_floats))
        panels.use(
            sample, panel, plane, lambda: panels.gather(sample, panel, plane),
            partial(self._multiply_runs, chunk, sample, xi, panel),
        )  # fmt: skip

    def _multiply_runs(self, chunk: Expr, sample: Expr, xi: Expr, panel: Expr, columns: WeightPanel) -> None:
        """All rows of the chunk times ``columns`` of the weights, run by run."""
        conv, tile = self.conv, self.tile
        depth = conv.channels_in
        live = self.panel_weights.live_in(sample)
        source = let(big(xi) * conv.source_plane)
        target = let(big(xi) * conv.product_plane + panel * tile.nr)
        most = tile.depth_block
        with serial(self.counts[chunk, 2]) as run:
            tap, last_tap, low, high = (let(self.runs[chunk, run, field]) for field in range(4))
            with when(tirx.any(tap == last_tap, live == 0) if conv.live_in else tap == last_tap):
                self._zero_products(target, low, high)
            with serial(ceil_div(last_tap - tap, tile.segment_taps)) as segment, serial(ceil_div(live, most)) as block:
                first_tap = let(tap + segment * tile.segment_taps)
                taps = (first_tap, let(tirx.min(first_tap + tile.segment_taps, last_tap)))
                first = let(block * most)
                channels = (first, let(tirx.min(live - first, most)) if depth > most or conv.live_in else live)
                fresh = let(tirx.all(segment == 0, block == 0))
                with serial(high - low) as offset:
                    current = let(low + offset)
                    rows = [let(self.rows_in[chunk, current, r]) for r in range(tile.mr)]
                    place = let(target + big(current) * (tile.mr * conv.panels * tile.nr))
                    self._register_tile(rows, source, place, columns, taps, channels, fresh)

    def _zero_products(self, target: Expr, low: Expr, high: Expr) -> None:
        """Rows that read no live frame or channel: their sums are empty."""
        tile, row_floats = self.tile, self.conv.panels * self.tile.nr
        with serial((high - low) * tile.mr) as row:
            place = let(target + big(low * tile.mr + row) * row_floats)
            for v in range(tile.vectors):
                store(self.products, number(0.0, tile.vector_floats), self._vector(place, v))

    def _vector(self, start: Expr, v: int) -> Expr:
        return lanes(start + v * self.tile.vector_floats, self.tile.vector_floats)

    def _register_tile(
        self,
        rows: list[Expr],
        source: Expr,
        place: Expr,
        columns: WeightPanel,
        taps: tuple[Expr, Expr],
        channels: tuple[Expr, Expr],
        fresh: Expr,
    ) -> None:
        """Accumulate ``taps`` × ``channels`` (first, count) of one tile of rows and put it (back) at ``place``."""
        conv, tile = self.conv, self.tile
        count, row_floats = tile.vector_floats, conv.panels * tile.nr
        acc = [[scratch((count,)) for _ in range(tile.vectors)] for _ in range(tile.mr)]
        cells = [(r, v) for r in range(tile.mr) for v in range(tile.vectors)]

        def clear() -> None:
            for r, v in cells:
                store(acc[r][v], number(0.0, count), lanes(0, count))

        def resume() -> None:
            for r, v in cells:
                store(acc[r][v], self.products[self._vector(place + r * row_floats, v)], lanes(0, count))

        choose(fresh, clear, resume)
        with serial(taps[1] - taps[0]) as offset:
            entry = let(taps[0] + offset)
            shift = let(self.taps[entry, 1])
            sources = [let(source + big(row + shift) * conv.channels_in) for row in rows]
            self._multiply(sources, columns.at(self.taps[entry, 0]), channels, acc)
        for r, v in cells:
            store(self.products, acc[r][v][lanes(0, count)], self._vector(place + r * row_floats, v))

    def _multiply(
        self,
        sources: list[Expr],
        columns: WeightPanel,
        channels: tuple[Expr, Expr],
        acc: list[list[tirx.Buffer]],
    ) -> None:
        """``acc[r] += v[r, k] · u[k]`` over ``channels`` (first, count) of the live ones."""
        tile = self.tile
        first, count = channels
        whole = let(tirx.floordiv(count, tile.step)) if tile.step > 1 else 0
        if tile.step > 1:
            with serial(whole) as chunk:
                start = let(first + chunk * tile.step)
                values = [let(self.sources[lanes(at + start, tile.step)]) for at in sources]
                for k in range(tile.step):
                    spread = [splat(lane(value, k), tile.vector_floats) for value in values]
                    new_line = k * tile.nr // LINE_FLOATS != (k - 1) * tile.nr // LINE_FLOATS
                    self._multiply_add(spread, columns, big(start + k) * tile.nr, acc, new_line)
        if tile.step == 1 or not isinstance(count, int) or count % tile.step:
            with serial(count - whole * tile.step) as rest:
                k = first + whole * tile.step + rest
                spread = [splat(self.sources[at + big(k)], tile.vector_floats) for at in sources]
                self._multiply_add(spread, columns, big(k) * tile.nr, acc)

    def _multiply_add(
        self, values: list[Expr], columns: WeightPanel, row: Expr, acc: list[list[tirx.Buffer]], ahead: bool = True
    ) -> None:
        """One channel; ``ahead``: ask for the weights of the next block too."""
        count = self.tile.vector_floats
        row = let(row)
        w = [let(columns.weights[lanes(start + row, count)]) for start in columns.starts]
        if ahead:
            prefetch(columns.weights, columns.starts[0] + row + self.tile.depth_block * self.tile.nr)
        for r, value in enumerate(values):
            x = let(value)
            for v in range(self.tile.vectors):
                store(acc[r][v], acc[r][v][lanes(0, count)] + x * w[v], lanes(0, count))

    # -- phase 3 -----------------------------------------------------------------------------------------------------

    def _transform_outputs(self, chunk: Expr, sample: Expr, slot: Expr) -> None:
        """One tile of the output, all live channels."""
        mr = self.tile.mr
        row = let(self.rows_out[chunk, tirx.floordiv(slot, mr), tirx.floormod(slot, mr)])
        with when(row >= 0):
            self._transform_output(chunk, sample, slot, row)

    def _transform_output(self, chunk: Expr, sample: Expr, slot: Expr, row: Expr) -> None:
        conv, plan, window, tile = self.conv, self.plan, self.window, self.tile
        frame, local = let(tirx.floordiv(row, plan.columns)), let(tirx.floormod(row, plan.columns))
        column = let(self.columns[chunk, local])
        clip, place = let(tirx.floordiv(column, plan.places)), let(tirx.floormod(column, plan.places))
        index = (frame, tirx.floordiv(place, plan.tiles[2]), tirx.floormod(place, plan.tiles[2]))
        starts = [let(i * m) for i, m in zip(index, plan.m, strict=True)]
        axes = [axis for axis in range(3) if plan.transformed[axis]]
        waiting = scratch((plan.xi * tile.vector_floats,))
        source = let(big(slot) * (conv.panels * tile.nr))
        alpha = plan.alpha
        listed = self.out_channels if conv.live_out else None

        def channels(channel: Expr, count: int) -> None:
            together = ChannelVector.live(listed, sample, channel, count)
            bias = let(together.read(self.bias, 0))

            def product_at(at: list[Expr]) -> Expr:
                xi = (at[0] * alpha[1] + at[1]) * alpha[2] + at[2]
                return self.products[lanes(big(xi) * conv.product_plane + source + channel, count)]

            def result(at: Expr, value: Expr) -> None:
                offsets = (
                    tirx.floordiv(at, alpha[1] * alpha[2]),
                    tirx.floormod(tirx.floordiv(at, alpha[2]), alpha[1]),
                    tirx.floormod(at, alpha[2]),
                )
                coordinates = [let(start + offset) for start, offset in zip(starts, offsets, strict=True)]
                with when(self._is_stored(clip, coordinates)):
                    position = ((clip * window.out[0] + coordinates[0]) * window.out[1] + coordinates[1]) * window.out[
                        2
                    ]
                    target = let(big(position + coordinates[2]) * conv.channels_out)
                    together.write(partial(self._store_result, target), let(value + bias))

            self._along_axes(axes, 0, product_at, result, waiting, count)

        live = let(self.out_channels[sample, 0]) if conv.live_out else conv.channels_out
        self._each_vector(live, channels)

    def _is_stored(self, clip: Expr, at: Sequence[Expr]) -> Expr:
        """Whether output position ``at`` lies inside the clip and is read."""
        plan, out = self.plan, self.window.out
        inside = [at[axis] < out[axis] for axis in range(3) if out[axis] % plan.m[axis]]
        safe = [tirx.min(at[axis], out[axis] - 1) for axis in range(3)]
        if "out_frames" in self.args and plan.transformed[0]:
            inside.append(self.args["out_frames"][clip, safe[0]] != number(0.0))
        if plan.positions is not None:
            sample = clip if plan.positions[0] > 1 else 0
            frame = safe[0] if plan.positions[1] > 1 else 0
            inside.append(self.args["positions"][sample, frame, safe[1], safe[2]] != number(0.0))
        return tirx.all(*inside) if inside else tirx.IntImm("bool", 1)

    def _store_result(self, position: Expr, value: Expr, channel: Expr, count: int) -> None:
        """Residual, activation and the store of consecutive channels of the position that begins there."""
        at = position + channel
        if self.residual is not None:
            value = value + read(self.residual, at, count)
        write(self.y, activate(self.conv.activation, value, count), at, count)


def linear(matrix: np.ndarray, values: Sequence[Expr], count: int) -> list[Expr]:
    """``matrix @ values`` with what pairs of points ±a share computed once.

    Columns that agree in some rows and differ in sign in the others are added and subtracted first; rows that do so
    over the columns become a sum and a difference.
    """
    matrix, values = _fold_columns(matrix, list(values))
    results: list[Expr | None] = [None] * len(matrix)
    for row, coefficients in enumerate(matrix):
        if results[row] is not None:
            continue
        twin = _twin(matrix, row, [r for r in range(row + 1, len(matrix)) if results[r] is None])
        if twin is None:
            results[row] = let(_sum(coefficients, values, count))
            continue
        same = np.isclose(matrix[twin], coefficients)
        even = let(_sum(np.where(same, coefficients, 0), values, count))
        odd = let(_sum(np.where(same, 0, coefficients), values, count))
        results[row], results[twin] = let(even + odd), let(even - odd)
    return results


def _fold_columns(matrix: np.ndarray, values: list[Expr]) -> tuple[np.ndarray, list[Expr]]:
    columns, folded, left = [], [], list(range(matrix.shape[1]))
    while left:
        column = left.pop(0)
        twin = _twin(matrix.T, column, left)
        if twin is None:
            columns.append(matrix[:, column])
            folded.append(values[column])
            continue
        left.remove(twin)
        same = np.isclose(matrix[:, twin], matrix[:, column])
        columns += [np.where(same, matrix[:, column], 0), np.where(same, 0, matrix[:, column])]
        folded += [let(values[column] + values[twin]), let(values[column] - values[twin])]
    return np.stack(columns, axis=1), folded


def _twin(matrix: np.ndarray, row: int, others: list[int]) -> int | None:
    """A row equal to ``row`` up to some signs, each of the two parts shared being worth a sum of its own."""
    for other in others:
        same = np.isclose(matrix[other], matrix[row])
        opposite = np.isclose(matrix[other], -matrix[row])
        nonzero = ~np.isclose(matrix[row], 0)
        if (same | opposite).all() and (same & nonzero).any() and (opposite & nonzero).any():
            return other
    return None


def _sum(coefficients: np.ndarray, values: Sequence[Expr], count: int) -> Expr:
    total: Expr | None = None
    for coefficient, value in zip(coefficients, values, strict=True):
        if np.isclose(coefficient, 0):
            continue
        if total is None:
            total = value if coefficient == 1 else value * number(float(coefficient), count)
        elif coefficient == 1:
            total = total + value
        elif coefficient == -1:
            total = total - value
        else:
            total = total + value * number(float(coefficient), count)
    return number(0.0, count) if total is None else total
