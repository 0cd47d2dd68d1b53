"""Convolutions under masks, and what the tests of every kernel family do with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from hypothesis import strategies as st

from dance_tvm.schedules.cpu.channel_plan import plan_channels
from dance_tvm.schedules.cpu.tiles import Tile
from dance_tvm.schedules.geometry import Window

TARGET = tvm.target.Target({"kind": "llvm", "num-cores": 2})


def compiled(func: tvm.tirx.PrimFunc) -> object:
    name = str(func.attrs["global_symbol"])
    return tvm.compile(tvm.IRModule({name: func}), target=TARGET)[name]


def tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


SMALL_TILE = Tile(mr=3, vectors=2, vector_floats=4, step=1, block_tiles=4, segment_taps=2)


@dataclass
class Case:
    """One convolution and the masks around it; masks are boolean arrays or None."""

    batch: int = 1
    size: tuple[int, int, int] = (3, 5, 6)
    channels_in: int = 5
    channels_out: int = 7
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    tile: Any = SMALL_TILE
    in_frames: np.ndarray | None = None
    out_frames: np.ndarray | None = None
    positions: np.ndarray | None = None
    live_in: np.ndarray | None = None
    live_out: np.ndarray | None = None
    residual: bool = False
    zero_dead: str = "all"
    seed: int = 0

    @property
    def window(self) -> Window:
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
        return Window(self.batch, self.size, out, self.kernel, self.stride, self.padding, self.dilation)


def channel_list(live: np.ndarray, channels: int) -> tvm.runtime.Tensor:
    """The list of the live channels of each sample, from a boolean mask (samples, channels)."""
    listed = tensor(np.full((len(live), 1 + channels), -(2**31), "int32"))
    compiled(plan_channels(len(live), channels))(tensor(live.astype("float32")), listed)
    return listed


def draw_masks(draw: st.DrawFn, case: Case) -> None:
    """Give ``case`` masks of any axes, from empty to full."""
    out = case.window.out
    rng = np.random.default_rng(draw(st.integers(0, 999)))

    def mask(*shape: int) -> np.ndarray | None:
        density = draw(st.sampled_from([None, 0.0, 0.3, 0.7, 1.0]))
        return None if density is None else rng.random(shape) < density

    case.in_frames = mask(case.batch, case.size[0])
    case.out_frames = mask(case.batch, out[0])
    case.positions = mask(draw(st.sampled_from([1, case.batch])), draw(st.sampled_from([1, out[0]])), *out[1:])

    def channels(count: int) -> np.ndarray | None:
        run = draw(st.sampled_from([1, 4, 8]))  # vectors of channels that live or die together are moved whole
        alive = mask(case.batch, -(-count // run))
        return None if alive is None else alive.repeat(run, axis=1)[:, :count]

    case.live_in, case.live_out = channels(case.channels_in), channels(case.channels_out)
