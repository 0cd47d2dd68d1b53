"""Pruned weights as a PyTorch parametrisation: what is masked is zero in every forward pass, whatever is trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class WeightMask(nn.Module):
    """``weight * mask`` with a mask of the weight's shape, kept in the state as bytes of 0 and 1."""

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.uint8, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        # A product would keep the sign of zero and let a diverged weight through as NaN; a choice is exactly zero.
        return torch.where(self.mask.bool(), weight, weight.new_zeros(()))


def add_mask(module: nn.Module) -> None:
    """Put a mask of ones on ``module.weight``, unless it has one. The state's names change until ``bake_masks``."""
    if _mask_of(module) is None:
        parametrize.register_parametrization(module, "weight", WeightMask(module.get_parameter("weight")))


def set_mask(module: nn.Module, keep: Tensor) -> None:
    """Keep the weights where ``keep`` is true, zero the others from now on. ``add_mask`` must have come first."""
    found = _mask_of(module)
    assert found is not None, "add_mask comes before set_mask"
    found.mask.copy_(keep)


def bake_masks(network: nn.Module) -> nn.Module:
    """Write the zeros into plain weights and take the masks off; the state has its ordinary names again."""
    for module in _masked(network):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return network


def _mask_of(module: nn.Module) -> WeightMask | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    for parametrisation in module.get_submodule("parametrizations.weight").children():
        if isinstance(parametrisation, WeightMask):
            return parametrisation
    return None


def _masked(network: nn.Module) -> Iterator[nn.Module]:
    for module in list(network.modules()):
        if _mask_of(module) is not None:
            yield module
