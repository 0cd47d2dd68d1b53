"""An ONNX file in float64, by ONNX's own reference: what its float32 runtime's answers are held against in doubt.

ONNX Runtime computes some operators less exactly than float32 allows, as the variance of an instance norm whose mean
is large. The reference shares no code with the import; convolutions and max pools, which it computes number by number,
are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional

from dance_tvm.frontend.interface import Arrays
from dance_tvm.frontend.onnx_file import in_float64

#: Operators that the reference computes number by number: a network of these would take minutes.
_SLOW = {"AveragePool", "LpPool", "Upsample", "GridSample", "DeformConv", "RoiAlign", "MaxUnpool", "Col2Im"}


def exact(model: Any, arrays: Arrays) -> list[np.ndarray] | None:
    """The outputs of ``model`` in float64; None where the reference cannot, or would take long."""
    if any(node.op_type in _SLOW for node in model.graph.node):
        return None
    wide = {name: array.astype(np.float64) if _is_float(array) else array for name, array in arrays.items()}
    try:
        runner = ReferenceEvaluator(in_float64(model), new_ops=[Conv, ConvTranspose, MaxPool, Resize])
        return [np.asarray(value) for value in cast(Sequence[Any], runner.run(None, wide))]
    except Exception:
        return None  # forms that the reference does not take in float64


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or str(array.dtype) == "bfloat16"


def _tensors(*arrays: np.ndarray | None) -> list[torch.Tensor | None]:
    return [None if array is None else torch.tensor(array) for array in arrays]


def _window(given: dict[str, Any], rank: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, and pads in front and behind. Raises NotImplementedError where they are to be computed."""
    if given.get("auto_pad") not in (None, "NOTSET", "VALID"):
        raise NotImplementedError(given["auto_pad"])
    strides, dilations = (list(given.get(name) or [1] * rank) for name in ("strides", "dilations"))
    pads = list(given.get("pads") or [0] * 2 * rank)
    return strides, dilations, pads[:rank], pads[rank:]


def _padded(x: torch.Tensor, front: list[int], behind: list[int], fill: float = 0.0) -> torch.Tensor:
    return functional.pad(x, list(chain(*zip(front[::-1], behind[::-1], strict=True))), value=fill)


class Conv(OpRun):
    """A convolution of one to three axes, by PyTorch."""

    op_domain = ""

    def _run(self, x: np.ndarray, w: np.ndarray, b: Any = None, **given: Any) -> tuple[np.ndarray]:
        strides, dilations, front, behind = _window(given, x.ndim - 2)
        data, weight, bias = _tensors(x, w, b)
        convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[x.ndim - 3]
        padded = _padded(cast(torch.Tensor, data), front, behind)
        return (convolve(padded, weight, bias, strides, 0, dilations, given.get("group") or 1).numpy(),)


class ConvTranspose(OpRun):
    """A transposed convolution of one to three axes, by PyTorch, cut by its pads."""

    op_domain = ""

    def _run(self, x: np.ndarray, w: np.ndarray, b: Any = None, **given: Any) -> tuple[np.ndarray]:
        if given.get("output_shape"):
            raise NotImplementedError("output_shape")
        rank = x.ndim - 2
        strides, dilations, front, behind = _window(given, rank)
        more = list(given.get("output_padding") or [0] * rank)
        data, weight, bias = _tensors(x, w, b)
        names = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
        convolve: Any = names[rank - 1]
        whole = convolve(data, weight, bias, strides, 0, more, given.get("group") or 1, dilations)
        for axis, (begin, end) in enumerate(zip(front, behind, strict=True), 2):
            whole = whole.narrow(axis, begin, whole.shape[axis] - begin - end)
        return (whole.numpy(),)


class MaxPool(OpRun):
    """A max pool of one to three axes without places, by PyTorch."""

    op_domain = ""

    def _run(self, x: np.ndarray, **given: Any) -> tuple[np.ndarray]:
        if given.get("ceil_mode") or len(self.output) > 1:
            raise NotImplementedError("ceil_mode")
        strides, dilations, front, behind = _window(given, x.ndim - 2)
        pool: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[x.ndim - 3]
        padded = _padded(cast(torch.Tensor, _tensors(x)[0]), front, behind, -np.inf)
        return (pool(padded, list(given["kernel_shape"]), strides, 0, dilations).numpy(),)


class Resize(OpRun):
    """Nearest neighbours: the one before, and where sizes grow a whole number of times the nearest by half pixels."""

    op_domain = ""

    def _run(self, x: np.ndarray, roi: Any = None, scales: Any = None, sizes: Any = None, **given: Any) -> Any:
        rules = (given.get("coordinate_transformation_mode"), given.get("nearest_mode"))
        if given.get("mode") != "nearest" or given.get("axes") or given.get("antialias"):
            raise NotImplementedError(rules)
        by_size = sizes is not None and len(sizes)
        wanted = np.asarray(sizes) if by_size else np.floor(np.asarray(scales, np.float64) * x.shape).astype(int)
        whole = all(new % old == 0 for new, old in zip(wanted, x.shape, strict=True))
        before = rules == ("asymmetric", "floor") and (whole or by_size)
        if not before and not (whole and rules == ("half_pixel", "round_prefer_floor")):
            raise NotImplementedError(rules)
        for axis, (new, old) in enumerate(zip(wanted, x.shape, strict=True)):
            x = x.take(np.arange(new) * old // new, axis)
        return (x,)
