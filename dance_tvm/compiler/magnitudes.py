"""How large the values of a network become, which half precision has to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import tvm

from dance_tvm.compiler.check_inputs import USUAL
from dance_tvm.core.random_inputs import Kind, has_float_range, random_inputs
from dance_tvm.frontend.interpreter import trace

if TYPE_CHECKING:
    from dance_tvm.frontend import Imported
    from dance_tvm.frontend.interface import Arrays


def measured_on(imported: Imported, given: Iterable[Arrays]) -> Callable[[tvm.IRModule], Mapping[str, float]]:
    """A function that finds the largest magnitude of each variable of a module, by its name, on the inputs that every
    check begins with and the ``given`` ones."""
    ranged: tuple[Kind, ...] = ("ranged",) if any(map(has_float_range, imported.inputs)) else ()
    usual = [random_inputs(imported.inputs, seed, kind) for seed, kind in enumerate(USUAL + ranged)]

    def measure(mod: tvm.IRModule) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for arrays in [*usual, *given]:
            named = {param.name: array for param, array in zip(mod["main"].params, arrays.values(), strict=True)}
            try:
                for name, value in trace(mod, named):
                    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                        size = float(value.abs().nan_to_num(0.0, 0.0, 0.0).max())
                        found[name] = max(found.get(name, 0.0), size)
            except (IndexError, RuntimeError):  # an input that the source itself refuses, as an index out of range
                continue
        return found

    return measure
