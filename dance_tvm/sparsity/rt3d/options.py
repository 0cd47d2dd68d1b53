"""Options of RT3D's method of training; read without PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dance_tvm.core.errors import DanceError
from dance_tvm.core.printing import counted
from dance_tvm.sparsity.options import MethodOptions

SchemeName = Literal["filter", "vanilla", "slices", "kgs"]

_MOST_EPOCHS = 1000  # of so many, some are left for the penalty unless the shares never leave any


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

    def phases(self, epochs: int) -> tuple[int, int]:
        """The epochs, counted from 0, that pruning begins with and that retraining does, of a run of ``epochs``."""
        start = round(self.dense * epochs)
        if self.algorithm == "heuristic":  # it cuts at once
            return start, min(start, epochs - 1)
        return start, max(start, epochs - max(1, round(self.retrain * epochs)))

    def require_epochs(self, epochs: int) -> None:
        """Raise DanceError where ``epochs`` leave none for a penalty."""
        if self.algorithm == "heuristic" or self._leave_some(epochs):
            return
        enough = next((more for more in range(epochs + 1, _MOST_EPOCHS) if self._leave_some(more)), None)
        raise DanceError(
            f"--method kgs: {counted(epochs, 'epoch')} leave{'s' if epochs == 1 else ''} none for the {self.algorithm} "
            f"penalty between dense training ({self.dense:.0%}) and retraining ({self.retrain:.0%}): "
            + (f"give --epochs {enough} or more" if enough else "lower a share")
        )

    def _leave_some(self, epochs: int) -> bool:
        start, cut = self.phases(epochs)
        return start < cut
