"""Options of DANCE's two methods of training; read without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dance_tvm.sparsity.options import MethodOptions

Axis = Literal["frames", "channels", "positions"]
AXES: tuple[Axis, ...] = ("frames", "channels", "positions")


class AVAOptions(MethodOptions):
    """Options of `--method ava`."""

    variability: float = Field(0.1, ge=0, description="weight of the variability term")
    ramp: float = Field(0.5, ge=0, le=1, description="share of the epochs over which the weight grows")


class AAPOptions(MethodOptions):
    """Options of `--method aap`."""

    target_macs: float = Field(0.5, gt=0, description="share of the dense MACs (0.5, 50%), or a count (120M)")
    target_time: float | None = Field(
        None, gt=0, le=1, description="share of the dense time that the file of units predicts, in place of MACs"
    )
    axes: tuple[Axis, ...] = AXES
    group: int = Field(8, ge=1, description="channels that are decided together")
    grid: int = Field(8, ge=1, description="tiles along each edge at full resolution, or at most with units")
    units: Path | None = Field(None, description="file by `dance-tvm units`: decide in what kernels can skip")
    compute: float = Field(2.0, ge=0, description="weight of the compute term")
    guide: float = Field(1.0, ge=0, description="weight of the guide at the start")
    ramp: float = Field(0.5, ge=0, le=1)
    distill: float = Field(1.0, ge=0, description="weight of the distance from the dense network's scores")
    hint: float = Field(0.0, ge=0, description="weight of the distance from the dense network's activations")
    momentum: float = Field(0.02, gt=0, le=1, description="of batch norm's running averages")
    keep_norm: bool = Field(False, description="leave the backbone's batch norm as it came, for small batches")
    freeze: float = Field(0.0, ge=0, le=1, description="last share of the epochs with the backbone frozen")
    backbone_rate: float = Field(0.3, gt=0, description="learning rate of the backbone, times --lr")
    controller_rate: float = Field(3.0, gt=0, description="learning rate of the controller, times --lr")
    threshold_rate: float = Field(10.0, gt=0, description="learning rate of theta, times --lr")
    start: int = Field(0, ge=0, description="training clips that rank channel groups, to leave out at once")
    floor: float = Field(0.4, ge=0, le=1, description="share of each site's channel groups that `start` leaves")
    refit: int = Field(0, ge=0, description="training clips to which `start` fits the weights by least squares")

    @field_validator("target_macs", "target_time", mode="before")
    @classmethod
    def _parse_target(cls, value: Any) -> Any:
        return parse_amount(value)

    @field_validator("axes", mode="before")
    @classmethod
    def _parse_axes(cls, value: Any) -> Any:
        return tuple(value.split("+")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_start(self) -> AAPOptions:
        if self.start and "channels" not in self.axes:
            raise ValueError("start leaves out channels: add them to axes or leave start out")
        if self.refit and not self.start:
            raise ValueError("refit fits weights to what start leaves: set start as well")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> AAPOptions:
        if self.target_time is None:
            return self
        if "target_macs" in self.model_fields_set:
            raise ValueError("a budget is one of time or of multiply-adds: leave --target-macs or the time out")
        if self.units is None:
            raise ValueError("a budget of time needs --set units=FILE, which `dance-tvm units --out FILE` writes")
        if self.start:
            raise ValueError("start meets a budget of multiply-adds: leave it out, or give --target-macs")
        return self


def parse_amount(value: Any) -> Any:
    """As numbers: "50%" is 0.5, "120M" is 120e6. Raises ValueError for a text that is not an amount."""
    if not isinstance(value, str):
        return value
    units = {"%": 0.01, "k": 1e3, "M": 1e6, "G": 1e9}
    unit = units.get(value[-1:])
    try:
        amount = float(value[:-1]) * unit if unit else float(value)
    except ValueError:
        raise ValueError(f"{value!r} is not an amount: write a share (0.5, 50%) or a count (120M)") from None
    if value.endswith("%") and amount > 1:
        raise ValueError(f"{value} is more than all")
    return amount
