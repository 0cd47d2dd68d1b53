"""What PyTorch leaves open, settled: operators that order values keep equal ones in the order in which they stood.

Any order of equal values is right, but a check that compares places needs one and the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

Both = tuple[Tensor, Tensor]


def _sorted(x: Tensor, dim: int = -1, descending: bool = False) -> Both:
    values, places = torch.ops.aten.sort.stable(x, stable=True, dim=dim, descending=descending)
    return values, places


def _top(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Both:
    values, places = _sorted(x, dim, largest)
    return (values.narrow(dim, 0, k), places.narrow(dim, 0, k)) if x.dim() else (values, places)


def _kth(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Both:
    if not x.dim():
        return x, torch.zeros((), dtype=torch.int64)
    values, places = (part.narrow(dim, k - 1, 1) for part in _sorted(x, dim))
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def _argsort(x: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return _sorted(x, dim, descending)[1]


def _median(x: Tensor, dim: int, keepdim: bool = False) -> Both:
    """The first NaN of a line that has one."""
    if not x.dim():
        return x, torch.zeros((), dtype=torch.int64)
    values, places = _kth(x, (x.shape[dim] + 1) // 2, dim, True)
    largest, first = x.max(dim, keepdim=True)
    places = torch.where(largest.isnan(), first, places)
    values = torch.where(largest.isnan(), largest, values)
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


_SETTLED: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.sort.default: _sorted,
    torch.ops.aten.argsort.default: _argsort,
    torch.ops.aten.topk.default: _top,
    torch.ops.aten.kthvalue.default: _kth,
    torch.ops.aten.median.dim: _median,
}


class _EqualsAsTheyStood(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _SETTLED.get(func, func)(*args, **(kwargs or {}))


def equal_values_as_they_stood(graph: fx.Graph) -> AbstractContextManager[Any]:
    """While the graph runs, and if it orders values at all."""
    orders = any(node.target in _SETTLED for node in graph.nodes)
    return _EqualsAsTheyStood() if orders else nullcontext()  # type: ignore[no-untyped-call]  # PyTorch's own
