"""Equation 3 without its task term: the sparsity loss, its schedule, and the bound loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sparsity_loss(share: Tensor, target: float) -> Tensor:
    """L_spar = (F / F_S - D)^2 with F averaged over the batch: `share` (N,) of the dense FLOPs, `target` is D."""
    return (share.mean() - target) ** 2


def sparsity_weight(epoch: float, warmup: float, alpha: float, beta: float) -> float:
    """lambda(e) = alpha * exp(beta * e), zero for the first K = `warmup` epochs (section 3.2)."""
    return 0.0 if epoch < warmup else alpha * math.exp(beta * epoch)


def density_bounds(epoch: float, relaxed: float, target: float) -> tuple[float, float]:
    """Least and largest share of tiles a mask may keep: `target` at first, 0 and 1 from the epoch `relaxed` on.

    Between them a cosine, as in the work that the paper takes the term from.
    """
    tightness = 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / relaxed))) if relaxed > 0 else 0.0
    return tightness * target, 1 - tightness * (1 - target)


def bound_loss(densities: Sequence[Tensor], bounds: tuple[float, float]) -> Tensor:
    """L_bound: the mean over blocks of the squared excess of a mask's density (averaged over the batch)."""
    least, largest = bounds
    means = torch.stack([density.mean() for density in densities])
    return ((means - largest).clamp(min=0) ** 2 + (least - means).clamp(min=0) ** 2).mean()
