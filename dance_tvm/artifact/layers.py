"""What a build decided, layer by layer."""

from __future__ import annotations

from pydantic import BaseModel


class LayerInfo(BaseModel):
    """What was decided for one layer; ``macs`` counts multiply-accumulates of the dense layer in one call.

    ``tuned`` tells which tuning record chose the tile sizes; empty where the defaults did. ``scratch_bytes`` is memory
    that the kernel holds while it runs, beside its input and output.
    """

    name: str
    kind: str
    kernel: str
    macs: int
    skips: list[str] = []
    reason: str = ""
    tuned: str = ""
    scratch_bytes: int = 0
