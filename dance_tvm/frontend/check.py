"""Compare an imported module with its source on random input, and find the first layer where they part."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import tvm

from dance_tvm.core.agreement import TOLERANCE, difference
from dance_tvm.core.errors import DanceError
from dance_tvm.frontend import interpreter
from dance_tvm.frontend.interface import Arrays
from dance_tvm.frontend.rounding import MULTIPLE, Rounding


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
    rounding = Rounding(mod, arguments)
    apart = [difference(found, wanted) for found, wanted in zip(rounding.float32, expected.values(), strict=True)]
    if max(apart) <= TOLERANCE or all(
        found <= max(TOLERANCE, MULTIPLE * own) for found, own in zip(apart, rounding.errors, strict=True)
    ):
        return
    values = intermediates()
    for name, value in interpreter.trace(mod, arguments):
        if name in values and isinstance(value, torch.Tensor):
            layer, reference = values[name]
            if (off := difference(value.numpy(), reference.numpy())) > TOLERANCE:
                raise DanceError(
                    f"The imported network differs from its source: first at layer {layer!r}, by {off:.1e} of its "
                    "largest value; please report this operator."
                )
    raise DanceError(
        f"The imported network's outputs differ from its source's by {max(apart):.1e} of their largest value."
    )
