"""The compiler's order of passes, read in one screen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tvm
from pydantic import BaseModel
from tvm import relax

if TYPE_CHECKING:
    from dance_tvm.target import Target


class LayerInfo(BaseModel):
    """What was decided for one layer; ``macs`` counts multiply-accumulates of the dense layer in one call."""

    name: str
    kind: str
    kernel: str
    macs: int
    skips: list[str] = []
    reason: str = ""


@dataclass(frozen=True)
class Options:
    """What a build may choose."""

    threads: int = 1
    numerics: Literal["fast", "exact"] = "fast"
    conv: Literal["auto", "direct", "winograd"] = "auto"
    sparsity: Literal["auto", "off"] = "auto"
    debug_dump: Path | None = None


@dataclass(frozen=True)
class Lowered:
    """A module ready for ``tvm.compile``, the decisions taken, and the weights lifted out of it (by parameter name)."""

    mod: tvm.IRModule
    layers: list[LayerInfo] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)


def lower(
    mod: tvm.IRModule, target: Target, options: Options, on_phase: Callable[[str], None] | None = None
) -> Lowered:
    """Turn an imported Relax module into one whose every operator has a kernel for ``target``."""
    if on_phase:
        on_phase("lower")
    with target.tvm_target(options.threads):
        return Lowered(relax.get_pipeline("zero")(mod))
