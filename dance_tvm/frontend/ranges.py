"""Which values an integer input may take: an index, a class or a length has a range that no type expresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.frontend.interface import Arrays, TensorSpec

Range = tuple[int, int]
#: Every value of the type, indices and lengths up to so many, and divisors.
_TRIED = (None, (0, 4), (0, 2), (0, 1), (0, 0), (1, 4))


def with_ranges(
    specs: Sequence[TensorSpec], reference: Callable[[Arrays], Arrays], examples: Mapping[str, np.ndarray] | None = None
) -> list[TensorSpec]:
    """``specs`` with the range of each integer input that ``reference`` takes, found by trying.

    ``examples`` are inputs that the source is known to take. Raises DanceError where it takes none of what was tried.
    """
    integers = {spec.name for spec in specs if "int" in spec.dtype}
    if not integers:
        return list(specs)
    known = {name: (0, int(array.max())) for name, array in (examples or {}).items() if name in integers and array.size}
    tried: list[Mapping[str, Range | None]] = [dict.fromkeys(integers, within) for within in _TRIED]
    tried[1:1] = [known] if known else []
    problem: Exception | None = None
    for ranges in tried:
        chosen = [_within(spec, ranges.get(spec.name)) for spec in specs]
        try:
            reference(random_inputs(chosen))
        except Exception as failure:  # PyTorch and ONNX Runtime have many kinds for an index out of range
            problem = failure
        else:
            return chosen
    reason = (str(problem).splitlines() or [""])[0]
    raise DanceError(f"the network itself fails on random input, its integers {', '.join(integers)} small: {reason}")


def _within(spec: TensorSpec, within: Range | None) -> TensorSpec:
    return spec if within is None else replace(spec, range=within)
