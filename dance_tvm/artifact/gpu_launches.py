"""What a GPU runs of a module: its code, and how each function launches the kernels in it. Nothing here needs TVM."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

Ref = int | str  # an argument by its place, or a workspace by its name


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what it is given, how many blocks on each axis, how many threads a block."""

    kernel: str
    arguments: tuple[Ref, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


@dataclass
class Plan:
    """How one function runs: its launches in order, and bytes of the workspaces that it takes."""

    launches: list[Launch] = field(default_factory=list)
    workspaces: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceCode:
    """The device side of a module: OpenCL C (or another device language) and a plan for each function."""

    source: str
    plans: dict[str, Plan]

    def to_json(self) -> str:
        """As text, the inverse of ``from_json``."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> DeviceCode:
        """What ``to_json`` wrote."""
        facts = json.loads(text)
        plans = {
            name: Plan([_launch(each) for each in plan["launches"]], plan["workspaces"])
            for name, plan in facts["plans"].items()
        }
        return DeviceCode(facts["source"], plans)


def _launch(facts: dict[str, Any]) -> Launch:
    grid, block = (tuple(facts[key]) for key in ("grid", "block"))
    return Launch(facts["kernel"], tuple(facts["arguments"]), grid, block)
