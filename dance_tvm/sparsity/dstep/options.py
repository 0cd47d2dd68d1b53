"""Options of D-STEP's method of training; read without PyTorch."""

from __future__ import annotations

from pydantic import Field

from dance_tvm.sparsity.options import MethodOptions


class DSTEPOptions(MethodOptions):
    """`target_flops` is D, a share of the dense network's FLOPs as equation 2 counts them.

    `warmup_share` of the epochs is K; lambda(e) = alpha * exp(beta * e), where `beta` by default makes the last
    epoch's weight a hundred times the first's. `relax_share` of the epochs relaxes the bounds. `policy_lr` scales
    the policies' learning rate. `distill` weighs the distance from the scores of the dense network that training
    starts from, which is not the paper's. The other options are `DStepOptions`.
    """

    target_flops: float = Field(default=0.6, gt=0, le=1)
    warmup_share: float = Field(default=0.2, ge=0, lt=1)
    alpha: float = Field(default=1.0, ge=0)
    beta: float | None = None
    gamma: float = Field(default=1.0, ge=0)
    relax_share: float = Field(default=0.8, ge=0, le=1)
    temperature: float = Field(default=0.67, gt=0)
    policy_lr: float = Field(default=1.0, gt=0)
    distill: float = Field(default=0.0, ge=0)
    tile: tuple[int, ...] = (4, 2, 2)
    hidden: int = Field(default=64, ge=1)
    group: int = Field(default=1, ge=1)
    spatial: bool = True
    channels: bool = True
    reuse: bool = True
