"""Compare an imported module with its source on random input, and find the first layer where they part."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import tvm

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend import interpreter
from dance_tvm.frontend.interface import Arrays, tensor_of

# Rounding apart, import changes nothing: this much of the largest value, over hundreds of layers, is rounding.
TOLERANCE = 1e-4


def difference(found: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    """The largest difference, as a share of the largest expected value where that is over 1; inf where shapes differ.

    NaN agrees with NaN, infinities with themselves.
    """
    a, b = (
        value.double() if isinstance(value, torch.Tensor) else tensor_of(value).double() for value in (found, expected)
    )
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf"), float("inf"))
    finite = b[b.isfinite()].abs()
    return float(apart.max() / max(1.0, float(finite.max()) if finite.numel() else 1.0))


def check_import(
    mod: tvm.IRModule,
    inputs: Arrays,
    expected: Arrays,
    intermediates: Callable[[], Mapping[str, tuple[str, torch.Tensor]]],
) -> None:
    """Raise DanceError, naming the first layer that diverges, where ``mod`` and its source differ on ``inputs``.

    ``expected`` are the source's outputs; ``intermediates()``, called only on a difference, gives for variables of
    ``mod`` the source's layer and value.
    """
    arguments = {param.name: array for param, array in zip(mod["main"].params, inputs.values(), strict=True)}
    found = interpreter.outputs(mod, arguments)
    worst = max(difference(a, b) for a, b in zip(found, expected.values(), strict=True))
    if worst <= TOLERANCE:
        return
    values = intermediates()
    for name, value in interpreter.trace(mod, arguments):
        if name in values and isinstance(value, torch.Tensor):
            layer, reference = values[name]
            if (apart := difference(value, reference)) > TOLERANCE:
                raise DanceError(
                    f"The imported network differs from its source: first at layer {layer!r}, by {apart:.1e} of its "
                    "largest value; please report this operator."
                )
    raise DanceError(f"The imported network's outputs differ from its source's by {worst:.1e} of their largest value.")
