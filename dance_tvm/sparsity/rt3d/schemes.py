"""The three structured sparsity schemes of RT3D (section 3) on weights (M filters, N channels, *kernel), and slices.

A *unit* is what a scheme removes as a whole:

    filter    one filter                                          units (M,)
    vanilla   a kernel group of gm filters by gn channels         units (P, Q)
    slices    one frame of a kernel group, in all its kernels     units (P, Q, KT)
    kgs       one tap of a kernel group, in all its kernels       units (P, Q, *kernel)

with P = ceil(M / gm), Q = ceil(N / gn); groups at the edge are smaller where the channels do not divide. A kernel may
have any number of dimensions: a 2D convolution is depth 1, and its slices are whole kernel groups. Slices are what a
Winograd kernel over height and width can leave out: it reads a frame of a kernel as a whole (docs/rt3d.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.rt3d.options import SchemeName

SCHEMES: tuple[SchemeName, ...] = ("filter", "vanilla", "slices", "kgs")


@dataclass(frozen=True)
class Scheme:
    """A sparsity scheme and its group size; ``filter`` ignores the group."""

    name: SchemeName = "kgs"
    gm: int = 8
    gn: int = 4

    def __post_init__(self) -> None:
        if self.name not in SCHEMES:
            raise DanceError(f"there is no sparsity scheme called {self.name!r}; choose one of {', '.join(SCHEMES)}")
        if self.gm < 1 or self.gn < 1:
            raise DanceError(f"a kernel group needs at least one filter and one channel, got {self.gm}x{self.gn}")

    def sums(self, values: Tensor) -> Tensor:
        """Sums of (M, N, *kernel) values over each unit, differentiable."""
        filters, channels, *kernel = values.shape
        if self.name == "filter":
            return values.flatten(1).sum(1)
        flat = values.reshape(filters, channels, -1)
        padded = functional.pad(flat, (0, 0, 0, -channels % self.gn, 0, -filters % self.gm))
        grouped = padded.reshape(-(-filters // self.gm), self.gm, -(-channels // self.gn), self.gn, flat.shape[2])
        units, own = grouped.sum((1, 3)), self._told_apart(kernel)
        return units.reshape(*units.shape[:2], math.prod(own), -1).sum(3).reshape(*units.shape[:2], *own)

    def sizes(self, weight: Tensor) -> Tensor:
        """How many weights each unit holds, int64; edge groups hold fewer."""
        filters, channels, *kernel = weight.shape
        if self.name == "filter":
            return torch.full((filters,), weight[0].numel(), device=weight.device)
        pairs = torch.outer(_lengths(filters, self.gm), _lengths(channels, self.gn)).to(weight.device)
        own = self._told_apart(kernel)
        sizes = pairs * (math.prod(kernel) // math.prod(own))
        return sizes.reshape(*pairs.shape, *[1] * len(own)).expand(*pairs.shape, *own)

    def expand(self, units: Tensor, weight: Tensor) -> Tensor:
        """The value of each weight's unit, in the shape of ``weight``."""
        filters, channels, *kernel = weight.shape
        if self.name == "filter":
            return units.reshape(filters, *[1] * (weight.dim() - 1)).expand(weight.shape)
        alike = [1] * (len(kernel) - len(self._told_apart(kernel)))
        units = units.reshape(*units.shape, *alike).expand(*units.shape[:2], *kernel)
        spread = units.repeat_interleave(self.gm, 0).repeat_interleave(self.gn, 1)
        return spread[:filters, :channels]

    def norms(self, weight: Tensor, mix: float = 0.0) -> Tensor:
        """The norm of each unit: l2, l1 or (1 - mix) * l2 + mix * l1 / sqrt(size) between them, differentiable.

        Dividing l1 by the root of the size puts both on one scale: they agree where all weights of a unit are alike.
        """
        # The root has no gradient at zero; the floor is far below any weight that matters.
        l2 = (self.sums(weight.square()) + 1e-20).sqrt()
        if mix == 0:
            return l2
        l1 = self.sums(weight.abs()) / self.sizes(weight).sqrt()
        return (1 - mix) * l2 + mix * l1

    def _told_apart(self, kernel: Sequence[int]) -> Sequence[int]:
        """The leading dimensions of a kernel along which a kernel group's units differ."""
        return {"vanilla": (), "slices": kernel[:-2]}.get(self.name, kernel)

    def __str__(self) -> str:
        return self.name if self.name == "filter" else f"{self.name} {self.gm}x{self.gn}"


def _lengths(size: int, group: int) -> Tensor:
    """How many of ``size`` members each group really has."""
    return torch.tensor([min(group, size - start) for start in range(0, size, group)])
