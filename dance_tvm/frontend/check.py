"""Compare an imported module with its source on random input, and find the first layer where they part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import tvm

from dance_tvm.core.agreement import TOLERANCE, allowed_of, difference
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.frontend import interpreter
from dance_tvm.frontend.interface import Arrays, TensorSpec, array_of
from dance_tvm.frontend.rounding import MULTIPLE, Rounding

#: Inputs that are tried, each only where rounding left the one before it unclear.
_TRIES = 3


def check_import(
    mod: tvm.IRModule,
    inputs: Sequence[TensorSpec],
    source: Callable[[Arrays], Arrays],
    intermediates: Callable[[Arrays], Mapping[str, tuple[str, torch.Tensor]]],
    exact: Callable[[Arrays], Sequence[np.ndarray] | None] | None = None,
) -> None:
    """Raise DanceError, naming the first layer that diverges, where ``mod`` and its source differ on random input.

    ``intermediates``, called only on a difference, gives for variables of ``mod`` the source's layer and value;
    ``exact`` the source in float64, whose float32 may be the one that is off.
    """
    for seed in range(_TRIES):
        arrays = random_inputs(inputs, seed)
        if _agree(mod, arrays, source(arrays), intermediates, exact):
            return


def _agree(
    mod: tvm.IRModule,
    inputs: Arrays,
    expected: Arrays,
    intermediates: Callable[[Arrays], Mapping[str, tuple[str, torch.Tensor]]],
    exact: Callable[[Arrays], Sequence[np.ndarray] | None] | None,
) -> bool:
    """Whether ``mod`` answers as expected; no if only rounding excuses it. Raises DanceError where it does not."""
    arguments = {param.name: array for param, array in zip(mod["main"].params, inputs.values(), strict=True)}
    rounding = Rounding(mod, arguments)
    wanted = list(expected.values())
    apart = [difference(found, value) for found, value in zip(rounding.float32, wanted, strict=True)]
    allowed = [allowed_of(value) for value in wanted]
    if all(found <= bound for found, bound in zip(apart, allowed, strict=True)):
        return True
    bounds = [max(bound, MULTIPLE * own) for bound, own in zip(allowed, rounding.reach, strict=True)]
    if all(found <= bound for found, bound in zip(apart, bounds, strict=True)):
        return False
    wide = exact(inputs) if exact else None
    if wide is not None and all(
        difference(found, value) <= bound for found, value, bound in zip(rounding.float32, wide, allowed, strict=True)
    ):
        return True
    values = intermediates(inputs)
    for name, value in interpreter.trace(mod, arguments):
        if name in values and isinstance(value, torch.Tensor):
            layer, reference = values[name]
            if (off := difference(array_of(value), array_of(reference))) > TOLERANCE:
                raise DanceError(
                    f"the imported network differs from its source: first at layer {layer!r}, by {off:.1e} of its "
                    "largest value; please report this operator"
                )
    raise DanceError(
        f"the imported network's outputs differ from its source's by {max(apart):.1e} of their largest value"
    )
