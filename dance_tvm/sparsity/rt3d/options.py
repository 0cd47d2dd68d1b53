"""Options of RT3D's method of training; read without PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dance_tvm.sparsity.options import MethodOptions

SchemeName = Literal["filter", "vanilla", "slices", "kgs"]


class KGSOptions(MethodOptions):
    """Options of `--method kgs`."""

    algorithm: Literal["heuristic", "lasso", "reweighted"] = "reweighted"
    scheme: SchemeName = "kgs"
    rate: float = Field(2.6, ge=1)
    gm: int | None = Field(None, ge=1)
    gn: int | None = Field(None, ge=1)
    target: str = "host"
    budget: Literal["macs", "parameters"] = "macs"
    strength: float = Field(2e-3, ge=0)
    mix: float = Field(0.5, ge=0, le=1)
    epsilon: float = Field(0.1, gt=0)
    rounds: int = Field(4, ge=1)
    dense: float = Field(0.25, ge=0, lt=1)
    retrain: float = Field(0.35, gt=0, le=1)
    skip_first: bool = True
    # Clips for the heuristic's means of activations and gradients; more change the ranking little.
    calibration: int = Field(32, ge=1)
