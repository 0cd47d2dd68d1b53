"""The gathered convolution: an implicit GEMM that walks index lists (`docs/kernels.md`).

``Y[row_out, oc] = act(bias[oc] + Σ X[row_in + offset(tap), channel] · W[oc, tap, channel] + residual[row_out, oc])``
over the segments of a :class:`~.row_plan.RowPlan` and a list of live input channels. A tile of ``mr`` rows × ``nr``
output channels is accumulated in registers; its partial sums wait in a block-sized buffer between segments, so that
the weights of one segment are reused from the first-level cache by every tile of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, TypeVar

import numpy as np
from tvm import tirx

from ..convolution import Convolution
from ..emit import (
    FLOAT,
    Expr,
    big,
    cast,
    ceil_div,
    choose,
    flat,
    lane,
    lanes,
    let,
    number,
    parallel,
    read,
    scratch,
    serial,
    short,
    splat,
    store,
    when,
    write,
)
from ..epilogue import activate_for
from ..kernel import Operand, Planned
from ..plans import RowPlan
from ..space import Space
from ..workload import Workload
from .channel_plan import ChannelPlan
from .compact_channels import CompactChannels
from .cost import axis_densities, direct_seconds
from .dead_outputs import zero_dead
from .direct_spaces import GatherSpace
from .panel_weights import PanelWeights, WeightPanel, are_consecutive
from .tiles import Machine, Tile


@dataclass(frozen=True)
class GatherConv(Convolution):
    """A convolution for the tiles of a CPU.

    With ``live_in`` the input holds the live channels alone, side by side (:mod:`~.compact_channels`). With either list
    of channels, the weights of a block are gathered into a panel before they are used.
    """

    tile: Tile
    plan: RowPlan

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        step = f"_k{self.tile.step}" if self.tile.step > 1 else ""
        return f"conv3d_gather{self.marks}_{short(self.dtype)}_mr{self.tile.mr}_nr{self.tile.nr}{step}"

    @property
    def compact(self) -> bool:
        """Whether the kernel takes its input compacted to the live channels."""
        return self.live_in

    def source(self) -> Operand:
        """The input, compacted where ``compact`` says so."""
        return replace(super().source(), role="list" if self.compact else "data")

    def channel_planner(self, axis: str, channels: int) -> ChannelPlan:
        """One sweep over the mask."""
        return ChannelPlan(self.plan.samples, channels, axis)

    def channel_lists(self) -> list[Planned]:
        """The planners of live channels, and what brings live input channels side by side."""
        found, plan = super().channel_lists(), self.plan
        if self.compact:
            floats = self.tile.vector_floats
            sizes = (self.window, self.channels_in, plan.samples, plan.dynamic_taps, floats)
            compact = CompactChannels(*sizes, self.dtype)
            found.insert(1, Planned(compact, ("x",)))
        return found

    @property
    def bias_size(self) -> int:
        """Length of the packed bias."""
        return self.channels_out if self.live_out else self.panels * self.tile.nr

    def pack_bias(self, bias: np.ndarray) -> np.ndarray:
        """Pad the bias of each group to whole panels."""
        if self.live_out:
            return super().pack_bias(bias)
        padded = np.zeros((self.groups, self.bias_size // self.groups), "float32")
        padded[:, : self.group_out] = bias.reshape(self.groups, self.group_out)
        return padded.reshape(-1)

    def space(self, machine: Machine, workload: Workload) -> Space:
        """Register tile, cache blocking, order of loops."""
        return GatherSpace(machine.storing(self.dtype), workload)

    def sized(self: G, decisions: Mapping[str, int]) -> G:
        """With these sizes."""
        sizes: dict[str, Any] = {**decisions, "panels_outer": bool(decisions["panels_outer"])}
        tile = replace(self.tile, **sizes)
        mr, block_tiles, segment_taps = tile.mr, tile.block_tiles, tile.segment_taps
        plan = replace(self.plan, mr=mr, block_tiles=block_tiles, segment_taps=segment_taps)
        return replace(self, tile=tile, plan=plan)

    def predict(
        self, machine: Machine, threads: int, shares: Sequence[float] | None = None, whole_units: bool = False
    ) -> float:
        """As :mod:`~.cost` has it: single rows, so that units are whole in any case."""
        plan, stored = self.plan, machine.storing(self.dtype)
        masks = (plan.in_frames, plan.out_frames, plan.positions, plan.in_positions)
        assumed = shares or axis_densities((self.live_in, self.live_out, *masks))
        given = (self, self.tile, plan, stored, threads)
        return mean(direct_seconds(*given, share, self.columns_share) for share in assumed)

    @property
    def columns_share(self) -> float:
        """Multiply-accumulates over those of the dense layer, where weight columns are left out."""
        return 1.0

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Blocks of rows by panels of output channels."""
        GatherEmitter(self, args).emit()


G = TypeVar("G", bound=GatherConv)


class GatherEmitter:
    """The kernel's parts, down to the multiply-add."""

    def __init__(self, conv: GatherConv, args: Mapping[str, tirx.Buffer]) -> None:
        self.conv, self.args = conv, args
        self.tile = conv.tile
        #: Whether a panel is any ``nr`` live output channels, or ``nr`` consecutive ones.
        self.listed_panels = conv.live_out
        self.bias, self.taps, self.counts = args["bias"], args["tap_entries"], args["counts"]
        self.rows_in, self.rows_out = args["rows_in"], args["rows_out"]
        self.segments, self.blocks = args["segments"], args["blocks"]
        self.x, self.weights, self.y = flat(args["x"]), flat(args["weights"]), flat(args["y"])
        self.in_channels: Any = args.get("in_channels")
        self.out_channels: Any = args.get("out_channels")
        self.residual = flat(args["residual"]) if conv.residual else None
        lists = (self.in_channels, self.out_channels)
        self.panel_weights = PanelWeights(self.weights, self.tile, conv.window.taps, conv.depth, *lists)

    def emit(self) -> None:
        conv = self.conv
        if conv.zero_dead:
            zero_dead(conv, self.args, self.y)
        with serial(conv.plan.samples) as sample:
            blocks = let(self.counts[sample, 0])
            panels = self.panel_weights.live_panels(sample, conv.panels)
            with parallel(blocks * panels) as task:
                if self.tile.panels_outer:
                    panel, block = let(tirx.floordiv(task, blocks)), let(tirx.floormod(task, blocks))
                else:
                    block, panel = let(tirx.floordiv(task, panels)), let(tirx.floormod(task, panels))
                self._block(sample, block, panel)

    def _block(self, sample: Expr, block: Expr, panel: Expr) -> None:
        """All segments of one block for one panel of output channels."""
        tile = self.tile
        partial = scratch((tile.block_tiles * tile.mr * tile.nr,))
        first_tile = let(block * tile.block_tiles)
        tiles = let(tirx.min(tile.block_tiles, self.counts[sample, 1] - first_tile))
        self._start_from_bias(sample, panel, partial, tiles)

        def multiply(weights: WeightPanel) -> None:
            begin = let(self.blocks[sample, block])
            end = let(self.blocks[sample, block + 1])
            with serial(end - begin) as index:
                segment = let(begin + index)
                tap, last_tap, low, high = (let(self.segments[sample, segment, field]) for field in range(4))
                weights.prepare(tap, last_tap)
                with self._depth_blocks(sample) as channels, serial(high - low) as offset:
                    current = let(low + offset)
                    place = let(big(current - first_tile) * (tile.mr * tile.nr))
                    self._tile(sample, panel, current, place, partial, (tap, last_tap), channels, weights)

        panels = self.panel_weights
        panels.use(sample, panel, big(0), lambda: panels.gather(sample, panel, big(0), self.taps), multiply)
        self._store_block(sample, panel, first_tile, tiles, partial)

    @contextmanager
    def _depth_blocks(self, sample: Expr) -> Iterator[tuple[Expr, Expr]]:
        """Loop over blocks of live input channels: (first, count). One block needs no loop."""
        live, most = self.panel_weights.live_in(sample), self.tile.depth_block
        if self.conv.depth <= most:
            yield 0, live
            return
        with serial(ceil_div(live, most)) as block:
            first = let(block * most)
            yield first, let(tirx.min(live - first, most))

    def _start_from_bias(self, sample: Expr, panel: Expr, partial: tirx.Buffer, tiles: Expr) -> None:
        tile = self.tile
        if self.listed_panels:
            bias = scratch((tile.nr,))
            for index, channel in enumerate(self.panel_weights.columns(sample, panel)):
                store(bias, self.bias[channel], index)
            values = [let(bias[lanes(v * tile.vector_floats, tile.vector_floats)]) for v in range(tile.vectors)]
        else:
            start = panel * tile.nr
            values = [
                let(self.bias[lanes(start + v * tile.vector_floats, tile.vector_floats)]) for v in range(tile.vectors)
            ]
        with serial(tiles * tile.mr) as row:
            for v, value in enumerate(values):
                store(partial, value, lanes(row * tile.nr + v * tile.vector_floats, tile.vector_floats))

    def _tile(
        self,
        sample: Expr,
        panel: Expr,
        current: Expr,
        place: Expr,
        partial: tirx.Buffer,
        taps: tuple[Expr, Expr],
        channels: tuple[Expr, Expr],
        weights: WeightPanel,
    ) -> None:
        """Accumulate the segment's taps over one tile."""
        tap, last_tap = taps
        stride, start = self._input_layout(sample, panel)
        rows = [let(big(self.rows_in[sample, current, r]) * stride + start) for r in range(self.tile.mr)]
        acc = self._started(partial, place)
        with serial(last_tap - tap) as offset:
            entry = let(tap + offset)
            shift = let(big(self.taps[entry, 1]) * stride)
            sources = [let(row + shift) for row in rows]
            self._multiply(sources, weights.at(self.taps[entry, 0]), channels, acc)
        self._put_back(acc, partial, place)

    def _started(self, partial: tirx.Buffer, place: Expr) -> list[list[tirx.Buffer]]:
        """Registers of one tile: they go on from the partial sums, or in half precision, which must not add up too many
        products, from zero."""
        tile, count, dtype = self.tile, self.tile.vector_floats, self.conv.dtype
        acc = [[scratch((count,), dtype) for _ in range(tile.vectors)] for _ in range(tile.mr)]

        def start(r: int, v: int, at: int) -> None:
            value = partial[lanes(place + at, count)] if dtype == FLOAT else number(0.0, count, dtype)
            store(acc[r][v], value, lanes(0, count))

        self._each_vector(start)
        return acc

    def _put_back(self, acc: list[list[tirx.Buffer]], partial: tirx.Buffer, place: Expr) -> None:
        """The partial sums, which are float32, after a pass over one tile."""
        count, dtype = self.tile.vector_floats, self.conv.dtype

        def end(r: int, v: int, at: int) -> None:
            value = acc[r][v][lanes(0, count)]
            if dtype != FLOAT:
                value = partial[lanes(place + at, count)] + cast(value, FLOAT, count)
            store(partial, value, lanes(place + at, count))

        self._each_vector(end)

    def _input_layout(self, sample: Expr, panel: Expr) -> tuple[Expr, Expr]:
        """Floats from one input position to the next, and where the first one read lies."""
        conv = self.conv
        if conv.compact:
            live = self.panel_weights.live_in(sample)
            positions = conv.window.positions_in // conv.plan.samples
            return live, let(sample * positions * (conv.channels_in - live))
        if conv.groups == 1:
            return conv.channels_in, 0
        return conv.channels_in, let(tirx.floordiv(panel, conv.panels // conv.groups) * conv.depth)

    def _each_vector(self, visit: Callable[[int, int, int], None]) -> None:
        for r in range(self.tile.mr):
            for v in range(self.tile.vectors):
                visit(r, v, r * self.tile.nr + v * self.tile.vector_floats)

    def _multiply(
        self,
        sources: list[Expr],
        weights: WeightPanel,
        channels: tuple[Expr, Expr],
        acc: list[list[tirx.Buffer]],
    ) -> None:
        """``acc[r] += x[r, channel] · w[channel]`` over ``channels`` (first, count)."""
        tile = self.tile
        first, count = channels
        if isinstance(count, int) and count <= 4:
            for k in range(count):
                self._multiply_one(sources, weights, k, k * tile.nr, acc)
            return
        whole = let(tirx.floordiv(count, tile.step)) if tile.step > 1 else 0
        if tile.step > 1:
            with serial(whole) as chunk:
                self._multiply_step(sources, weights, let(big(first + chunk * tile.step)), tile.step, acc)
        if tile.step == 1 or not isinstance(count, int) or count % tile.step:
            with serial(count - whole * tile.step) as k:
                channel = big(first + whole * tile.step + k)
                self._multiply_one(sources, weights, channel, channel * tile.nr, acc)

    def _multiply_one(
        self,
        sources: list[Expr],
        weights: WeightPanel,
        channel: Expr,
        weight_at: Expr,
        acc: list[list[tirx.Buffer]],
    ) -> None:
        count = self.tile.vector_floats
        w = [let(weights.weights[lanes(start + weight_at, count)]) for start in weights.starts]
        for r, source in enumerate(sources):
            x = let(splat(self.x[source + channel], count))
            for v in range(self.tile.vectors):
                store(acc[r][v], acc[r][v][lanes(0, count)] + x * w[v], lanes(0, count))

    def _multiply_step(
        self,
        sources: list[Expr],
        weights: WeightPanel,
        channel: Expr,
        step: int,
        acc: list[list[tirx.Buffer]],
    ) -> None:
        """``step`` channels at once: one vector load a row, then a multiply by each of its lanes."""
        count = self.tile.vector_floats
        xs = [let(self.x[lanes(source + channel, step)]) for source in sources]
        for k in range(step):
            row = (channel + k) * self.tile.nr
            w = [let(weights.weights[lanes(start + row, count)]) for start in weights.starts]
            for r, x in enumerate(xs):
                for v in range(self.tile.vectors):
                    product = splat(lane(x, k), count) * w[v]
                    store(acc[r][v], acc[r][v][lanes(0, count)] + product, lanes(0, count))

    def _store_block(self, sample: Expr, panel: Expr, first_tile: Expr, tiles: Expr, partial: tirx.Buffer) -> None:
        """Residual, activation, and the scatter to the output rows and channels."""
        conv, tile = self.conv, self.tile
        per_group = conv.panels // conv.groups
        group = 0 if conv.groups == 1 else tirx.floordiv(panel, per_group)
        within = panel if conv.groups == 1 else tirx.floormod(panel, per_group)
        columns: list[Expr] = []
        if self.listed_panels:
            columns = [let(channel) for channel in self.panel_weights.columns(sample, panel)]
            consecutive = let(are_consecutive(columns))
            live = let(self.out_channels[sample, 0] - panel * tile.nr)
        start = let(group * conv.group_out + within * tile.nr)
        valid = let(conv.group_out - within * tile.nr)
        with serial(tiles) as index, serial(tile.mr) as r:
            target = let(self.rows_out[sample, first_tile + index, r] * conv.channels_out)
            source = let((index * tile.mr + r) * tile.nr)

            def scatter(source: Expr = source, target: Expr = target) -> None:
                for at, column in enumerate(columns):
                    with when(at < live):  # in place, what lies past the end is not the last channel's
                        self._finish(partial, source + at, target + column, column, 1)

            def write(source: Expr = source, target: Expr = target) -> None:
                for v in range(tile.vectors):
                    at = v * tile.vector_floats
                    self._finish(partial, source + at, target + columns[0] + at, columns[0] + at, tile.vector_floats)

            if self.listed_panels:
                choose(consecutive, write, scatter)
            else:
                self._store_vectors(partial, source, target, start, valid)

    def _store_vectors(self, partial: tirx.Buffer, source: Expr, target: Expr, start: Expr, valid: Expr) -> None:
        """Store the panel's vectors, in smaller ones where the output channels end inside one."""
        tile, conv = self.tile, self.conv
        for v in range(tile.vectors):
            at = v * tile.vector_floats

            def whole(at: int = at) -> None:
                self._finish(partial, source + at, target + start + at, start + at, tile.vector_floats)

            def part(at: int = at) -> None:
                with when(valid > at):  # then exactly what whole vectors leave over
                    for first, count in parts_of(conv.group_out % tile.vector_floats):
                        place = at + first
                        self._finish(partial, source + place, target + start + place, start + place, count)

            if conv.group_out % tile.nr == 0:
                whole()
            else:
                choose(valid >= at + tile.vector_floats, whole, part)

    def _finish(self, partial: tirx.Buffer, source: Expr, target: Expr, channel: Expr, count: int) -> None:
        value = partial[lanes(source, count)]
        if self.residual is not None:
            value = value + read(self.residual, target, count)
        value = activate_for(str(self.y.dtype), self.conv.activation, value, count)
        write(self.y, self._finished(value, channel, count), target, count)

    def _finished(self, value: Expr, channel: Expr, count: int) -> Expr:
        """What is stored for output channels ``channel …``."""
        return value


def parts_of(lanes_left: int) -> list[tuple[int, int]]:
    """So many lanes as vectors of 2^n: where each begins, and its lanes."""
    found, first = [], 0
    for bit in reversed(range(lanes_left.bit_length())):
        if lanes_left >> bit & 1:
            found.append((first, 1 << bit))
            first += 1 << bit
    return found
