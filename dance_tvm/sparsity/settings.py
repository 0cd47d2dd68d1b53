"""What a training run may choose."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """What one run is. `fingerprint` is the part that a resumed run must share with its checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    model: str
    data: str
    options: dict[str, Any] = {}
    epochs: int = 10
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: str = "adam"
    warmup: float = 0.05
    clip_norm: float = 5.0
    seed: int = 0
    amp: bool = True
    precision: str = "float16"
    accumulate: int = 1
    workers: int = 0
    init: str | None = None

    def fingerprint(self) -> dict[str, Any]:
        same = {
            "amp",
            "precision",
            "accumulate",
            "method",
            "model",
            "data",
            "options",
            "epochs",
            "batch",
            "lr",
            "weight_decay",
            "optimizer",
            "seed",
            "init",
        }
        return json.loads(json.dumps(self.model_dump(include=same)))
