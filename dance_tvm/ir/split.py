"""A tensor cut into parts, of which some may have no elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax


def split(emit: Callable[[Any], Any], x: relax.Expr, sizes: Sequence[int], axis: int) -> list[relax.Expr]:
    """``x`` cut along ``axis`` into parts of ``sizes``: itself where one has all, constants where one has nothing, both
    of which Relax's own operator does not take."""
    shape, axis = [int(extent) for extent in x.ty.shape], axis % len(x.ty.shape)
    nothing = np.empty((*shape[:axis], 0, *shape[axis + 1 :]), str(x.ty.dtype.dtype))
    filled = [size for size in sizes if size]
    places = np.cumsum(filled)[:-1].tolist()
    found = iter(emit(relax.op.split(x, places, axis)) if places else [x])
    return [next(found) if size else relax.const(nothing, str(nothing.dtype)) for size in sizes]
