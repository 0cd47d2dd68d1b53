"""The protocol of all kernels: convolutions, linear layers, pools, norms and planners, on CPUs and GPUs.

A kernel is a frozen dataclass. Its ``operands`` alone define the order of its parameters: a caller walks them and
finds each tensor by its role and its name.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from tvm import tirx

from .emit import FLOAT, INT, Expr, argument, kernel
from .kernel_columns import Columns
from .preparation import Preparation
from .space import Space
from .workload import Workload

#: Where an operand comes from: the layer's input, what is added to its result, what its input is multiplied by,
#: ``Kernel.prepare``, a mask, one of ``Kernel.lists``, or nowhere: the kernel writes it.
Role = Literal["data", "residual", "gate", "constant", "mask", "list", "output"]
#: The kind of kernels that a run reports layer by layer: convolutions and linear layers.
LAYER = "convolution"
#: The kind of kernels that make lists.
PLANNER = "planner"
#: The kind of the kernel that leaves it to planners which of two kernels runs. Its call stands alone in a program, so
#: that who watches the calls can write something else where it has written.
FREE_CHOICE = "free choice"
#: The attribute of a function that holds what ``Kernel.describe`` gives, as JSON.
DESCRIPTION = "dance.kernel"


@dataclass(frozen=True)
class Operand:
    """One tensor that a kernel takes.

    A mask is float32, nonzero where something is alive, of ``axis`` (one of ``workload.LISTS``, or whatever its caller
    calls it); ``field`` is what it broadcasts to over (N, T, H, W, C) before it is seen as ``shape``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = FLOAT
    role: Role = "data"
    axis: str = ""
    field: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def constant(name: str, shape: tuple[int, ...], dtype: str = FLOAT) -> Operand:
    """What ``Kernel.prepare`` makes."""
    return Operand(name, shape, dtype, "constant")


def listed(name: str, shape: tuple[int, ...]) -> Operand:
    """A list that one of ``Kernel.lists`` makes."""
    return Operand(name, shape, INT, "list")


def output(name: str, shape: tuple[int, ...], dtype: str = FLOAT) -> Operand:
    """What the kernel writes."""
    return Operand(name, shape, dtype, "output")


def frames_mask(axis: str, batch: int, frames: int) -> Operand:
    """A mask (batch, frames)."""
    return Operand(axis, (batch, frames), role="mask", axis=axis, field=(batch, frames, 1, 1, 1))


def positions_mask(axis: str, shape: tuple[int, ...]) -> Operand:
    """A mask (clips or 1, frames or 1, height, width)."""
    return Operand(axis, shape, role="mask", axis=axis, field=(*shape, 1))


def channels_mask(name: str, axis: str, samples: int, channels: int) -> Operand:
    """A mask (samples, channels)."""
    return Operand(name, (samples, channels), role="mask", axis=axis, field=(samples, 1, 1, 1, channels))


@dataclass(frozen=True)
class Planned:
    """A planner, and the names under which a kernel (or the planners after it) knows its outputs, in order."""

    planner: Kernel
    names: tuple[str, ...]


@dataclass(frozen=True)
class Weights:
    """A layer's weights: float32 (C_out, C_in / groups, KT, KH, KW), or None where only time is asked of its kernel,
    bias (C_out,), and, with kernel groups, their columns and the columns' weights (columns, filters of a group)."""

    weight: np.ndarray | None
    bias: np.ndarray
    columns: Columns | None = None
    column_weights: np.ndarray | None = None


@dataclass(frozen=True)
class Count:
    """A number by sample: ``factor``, times element ``at`` of ``operand`` if one is named, divided by ``divisor`` and
    rounded down."""

    factor: int = 1
    operand: str = ""
    at: tuple[int, ...] = ()
    divisor: int = 1


class Kernel(ABC):
    """One compiled function."""

    #: What it is to a report: ``convolution`` (linear layers too), ``pool``, ``planner``, or another kind of operator.
    kind: ClassVar[str]
    #: Weight columns, and whatever else it leaves out that no mask accounts for, in a report's words.
    skips: ClassVar[tuple[str, ...]] = ()
    #: Whether small integers stay exact in it, whatever its sizes.
    exact: ClassVar[bool] = True
    #: Whether what it writes is the same in every call if what it reads is, so that it can run when compiled.
    foldable: ClassVar[bool] = True

    @property
    def preparation(self) -> Preparation | None:
        """How the operand ``weights`` is made of a layer's weights, where the artifact's library can do it."""
        return None

    @property
    def preparations(self) -> dict[str, Preparation]:
        """The same of all operands that are made so, by their names."""
        return {} if self.preparation is None else {"weights": self.preparation}

    def unprepared(self, weight: np.ndarray) -> np.ndarray:
        """What ``preparations`` make their operands of: the layer's weights, or those of them that it uses."""
        return weight

    @property
    def scratch_bytes(self) -> int:
        """Memory that it holds while it runs, beside its operands."""
        return 0

    @property
    @abstractmethod
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it for people; no program reads anything out of it."""

    @abstractmethod
    def operands(self) -> list[Operand]:
        """What it takes, in the order of its parameters; outputs come last."""

    def lists(self) -> list[Planned]:
        """The planners that make its lists, in an order in which each comes after those that it needs itself."""
        return []

    def prepare(self, weights: Weights | None) -> dict[str, np.ndarray]:
        """Its constants by the names of their operands. Packed weights are left out where ``weights`` has none."""
        return {}

    def unpacked(self, at: Expr) -> tuple[Expr, Expr, Expr, Expr] | None:
        """What lies at ``at`` of the operand ``weights``: output channel, tap and input channel, and whether there is
        one. None where packed weights are not those of the layer one by one."""
        return None

    @abstractmethod
    def emit(self, args: Mapping[str, Any]) -> None:
        """Emit the body of the function, its parameters given by the names of their operands."""

    def space(self, machine: Any, workload: Workload) -> Space | None:
        """Which of its sizes may be decided for ``workload`` on a machine of its kind; None where none are."""
        return None

    def sized(self: K, decisions: Mapping[str, int]) -> K:
        """The same kernel with sizes of its space."""
        raise TypeError(f"{self.name} has no sizes to decide")

    def predict(
        self, machine: Any, threads: int, shares: Sequence[float] | None = None, whole_units: bool = False
    ) -> float | None:
        """Seconds that a call is predicted to take on a machine of its kind.

        None where nothing is decided by them: for kernels that are the only one for what they compute (pools, norms,
        depthwise and transposed convolutions, planners), and on GPUs, whose targets have no rates: there tiles are
        compared by relative cost.

        The mean over ``shares``: of each axis that lists thin, so much is alive; by default what builds assume of
        masks. ``whole_units``: masks leave out what the kernel computes in one piece, and no parts of that.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """What a device needs to read its calls, ready for JSON: the manifest keeps it."""
        return {"name": self.name, "kind": self.kind, "operands": [operand.name for operand in self.operands()]}

    def inputs(self) -> list[Operand]:
        """The operands that it reads."""
        return [operand for operand in self.operands() if operand.role != "output"]

    def outputs(self) -> list[Operand]:
        """The operands that it writes."""
        return [operand for operand in self.operands() if operand.role == "output"]

    def primfunc(self, name: str = "", one_thread: bool = False) -> tirx.PrimFunc:
        """The function, called ``name`` or by the kernel's own name; with ``one_thread`` it never wakes another."""
        with kernel(name or self.name, {DESCRIPTION: json.dumps(self.describe())}, one_thread) as built:
            self.emit({each.name: argument(each.name, each.shape, each.dtype) for each in self.operands()})
        return built.func


K = TypeVar("K", bound=Kernel)


def described(func: tirx.PrimFunc) -> dict[str, Any] | None:
    """The description of the kernel that ``func`` was emitted from; None for functions of TVM's."""
    text = func.attrs.get(DESCRIPTION) if func.attrs else None
    return None if text is None else json.loads(str(text))
