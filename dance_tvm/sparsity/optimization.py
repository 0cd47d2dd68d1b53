"""Seeds, precision, optimizers and their rate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.settings import Settings


def seed_everything(*parts: int) -> None:
    """Seeds torch, numpy and every device from (seed, epoch, rank …)."""
    seed = int(np.random.SeedSequence(list(parts)).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)


def half_precision(settings: Settings, device: torch.device) -> torch.dtype | None:
    """The type that forward passes compute in where that is not float32: float16 only on GPUs, bfloat16 anywhere."""
    if not settings.amp or settings.precision == "float32":
        return None
    if settings.precision not in ("float16", "bfloat16"):
        raise DanceError(f"there is no precision called {settings.precision!r}; choose float32, float16 or bfloat16")
    if settings.precision == "float16" and device.type != "cuda":
        return None
    return getattr(torch, settings.precision)


def make_optimizer(settings: Settings, parameters: list[Any]) -> torch.optim.Optimizer:
    """The optimizer of the settings; raises DanceError where there is none of that name."""
    if settings.optimizer == "adam":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
    raise DanceError(f"there is no optimizer called {settings.optimizer!r}; choose adam or sgd")


def set_rate(optimizer: torch.optim.Optimizer, settings: Settings, step: int, steps_per_epoch: int) -> None:
    """Linear warm-up, then a cosine to zero; a function of only the step, so that there is no state to resume."""
    total = max(1, settings.epochs * steps_per_epoch)
    warm = max(1.0, settings.warmup * total)
    factor = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / total))
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * factor * group.get("lr_scale", 1.0)
