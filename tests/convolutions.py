"""Convolutions under masks, and what the tests of every kernel family do with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from hypothesis import strategies as st

from dance_tvm.schedules.cpu.tiles import Tile
from dance_tvm.schedules.elementary import written_out
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.kernel import Kernel, Weights

NEVER = -(2**31)
MOST_COMPILED = 64
TARGET = tvm.target.Target({"kind": "llvm", "num-cores": 2})


#: What was compiled last, by the function's structural hash: the same kernel is often called on several inputs.
_COMPILED: dict[int, tuple[tvm.tirx.PrimFunc, Callable[..., None]]] = {}


def compiled(func: tvm.tirx.PrimFunc) -> Callable[..., None]:
    key = tvm_ffi.structural_hash(func)
    known = _COMPILED.get(key)
    if known is None or not tvm_ffi.structural_equal(known[0], func):
        if len(_COMPILED) >= MOST_COMPILED:
            _COMPILED.clear()
        name = str(func.attrs["global_symbol"])
        known = _COMPILED[key] = (func, tvm.compile(tvm.IRModule({name: func}), target=TARGET)[name])
    return known[1]


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
    dtype: str = "float32"

    @property
    def window(self) -> Window:
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
        return Window(self.batch, self.size, out, self.kernel, self.stride, self.padding, self.dilation)


Arrays = list[np.ndarray]


def on_processor(func: tvm.tirx.PrimFunc, inputs: Arrays, outputs: Arrays) -> Arrays:
    """What ``func`` makes of ``outputs``."""
    tensors = [tensor(array) for array in [*inputs, *outputs]]
    compiled(written_out(func))(*tensors)
    return [each.numpy() for each in tensors[len(inputs) :]]


def call(
    kernel: Kernel,
    data: np.ndarray | None = None,
    masks: Mapping[str, np.ndarray | None] | None = None,
    weights: Weights | None = None,
    residual: np.ndarray | None = None,
    run: Callable[[tvm.tirx.PrimFunc, Arrays, Arrays], Arrays] = on_processor,
    gate: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What a kernel writes, after its planners, and all lists and constants by name.

    ``masks`` by axis. Memory that nobody has written yet holds NaN, or the least integer.
    """
    values: dict[str, np.ndarray] = {}

    def outputs(each: Kernel) -> Arrays:
        constants = each.prepare(weights)
        given = []
        for operand in each.inputs():
            if operand.role == "mask":
                found = np.asarray((masks or {})[operand.axis]).astype("float32")
            elif operand.role in ("data", "residual", "gate"):
                whole = {"data": data, "residual": residual, "gate": gate}[operand.role]
                found = np.asarray(whole).astype(operand.dtype, copy=False)
            else:
                found = {**values, **constants}[operand.name]
            assert found.shape == operand.shape
            given.append(found)
        blank = [np.full(o.shape, np.nan if "float" in o.dtype else NEVER, o.dtype) for o in each.outputs()]
        return run(each.primfunc(), given, blank)

    for planned in kernel.lists():
        values.update(zip(planned.names, outputs(planned.planner), strict=True))
    (result,) = outputs(kernel)
    return result, values | kernel.prepare(weights)


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


def pooled_by(values: np.ndarray, pool: tuple[int, int, int]) -> np.ndarray:
    """The maxima of (N, T, H, W, …) in windows side by side."""
    for axis, size in enumerate(pool, 1):
        whole = values.take(range(values.shape[axis] // size * size), axis)
        values = whole.reshape(*whole.shape[:axis], -1, size, *whole.shape[axis + 1 :]).max(axis + 1)
    return values


def read_together(mask: np.ndarray, pool: tuple[int, int, int]) -> np.ndarray:
    """``mask`` (N, T, …), the same under each window of a pool."""
    for axis in range(1, mask.ndim):
        size = pool[axis - 1] if mask.shape[axis] > 1 else 1
        mask = mask.take(range(0, mask.shape[axis], size), axis).repeat(size, axis)
    return mask
