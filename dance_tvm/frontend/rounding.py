"""How far rounding alone moves a network's outputs: no float32 program can be held to more."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
import tvm

from dance_tvm.core.agreement import difference
from dance_tvm.frontend import interpreter
from dance_tvm.frontend.interface import array_of

#: A right program may differ from the source by so many times the source's own rounding: sums in another order, and
#: Winograd's transforms, which round several times for each product.
MULTIPLE = 16

#: How often values are set off by rounding to see which way decisions at a threshold may fall.
_TRIALS = 3


class Rounding:
    """The rounding of one imported network on one input, evaluated with PyTorch when it is asked for."""

    def __init__(self, mod: tvm.IRModule, inputs: Mapping[str, np.ndarray]) -> None:
        self._mod, self._inputs = mod, inputs

    @cached_property
    def float32(self) -> list[np.ndarray]:
        """The outputs as the module computes them."""
        return self._outputs()

    @cached_property
    def float64(self) -> list[np.ndarray]:
        """The outputs in float64."""
        return self._outputs(wide=True)

    @cached_property
    def errors(self) -> list[float]:
        """By output, how far float32 is from float64."""
        return [difference(narrow, wide) for narrow, wide in zip(self.float32, self.float64, strict=True)]

    @cached_property
    def reach(self) -> list[float]:
        """By output, how far a few roundings of inputs, weights and what is summed move it, decisions among them."""
        reach = list(self.errors)
        for seed in range(_TRIALS):
            moved = self._outputs(noise=torch.Generator().manual_seed(seed))
            apart = [difference(found, still) for found, still in zip(moved, self.float32, strict=True)]
            reach = [max(pair) for pair in zip(reach, apart, strict=True)]
        return reach

    def _outputs(self, *, wide: bool = False, noise: torch.Generator | None = None) -> list[np.ndarray]:
        return [array_of(value) for value in interpreter.outputs(self._mod, self._inputs, wide=wide, noise=noise)]
