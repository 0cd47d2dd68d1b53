"""What a kernel of a convolution or linear layer is asked to compute, and the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from .geometry import GroupedChannels, Triple, Window
from .kernel import Kernel
from .kernel_columns import Nonzero, column_run
from .workload import KERNEL_GROUPS, PLANAR, TYPICAL_DENSITY, Workload


@dataclass(frozen=True)
class Limits:
    """Limits of memory: packed weights take at most ``growth`` times the layer's own, and scratch at most ``scratch``
    bytes.

    ``anew``: its scratch may hold weights that are transformed in every call.
    """

    growth: float = math.inf
    scratch: float = math.inf
    anew: bool = False


UNLIMITED = Limits()


@dataclass(frozen=True)
class Layer(GroupedChannels):
    """A layer: its shapes, what masks thin, and what its kernel does behind it.

    ``positions`` and ``in_positions``: how many clips and frames the mask of output and input positions tells apart.
    Of a layer whose zero weights are left out, ``group`` is the kernel group, ``columns`` how many columns are left,
    ``kept`` which share of all columns that is, and ``nonzero`` which weights are left, where that is known.
    ``memory`` limits what its kernel takes. ``gate``: its input is multiplied by a value for each clip and channel,
    then passes the activation ``before``. ``spread``: a transposed convolution's window sees the input's positions so
    far apart, zeros between them. ``planar``: its tensors have channels first (N, C, T, H, W). The other fields are
    those of :class:`.convolution.Convolution`.
    """

    window: Window
    channels_in: int
    channels_out: int
    groups: int = 1
    in_frames: bool = False
    out_frames: bool = False
    positions: tuple[int, int] | None = None
    in_positions: tuple[int, int] | None = None
    live_in: bool = False
    live_out: bool = False
    residual: bool = False
    activation: str = ""
    zero_dead: str = ""
    threads: int = 1
    dtype: str = "float32"
    group: tuple[int, int] = (1, 1)
    columns: int | None = None
    kept: float = 1.0
    nonzero: Nonzero | None = None
    memory: Limits = UNLIMITED
    gate: bool = False
    before: str = ""
    spread: Triple | None = None
    planar: bool = False

    @property
    def unmasked(self) -> Layer:
        """The same where no mask thins it."""
        nothing: dict[str, Any] = {"positions": None, "in_positions": None, "live_in": False, "live_out": False}
        return replace(self, in_frames=False, out_frames=False, zero_dead="", **nothing)

    @property
    def samples(self) -> int:
        """Clips whose channel lists differ: the batch where channels are listed, else 1."""
        return self.window.batch if self.live_in or self.live_out else 1

    @property
    def run(self) -> int:
        """Columns of consecutive channels that one list entry stands for; a mask of channels lists them singly."""
        return 1 if self.live_in else column_run(self.channels_in, self.group[1])

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its kernel that do not depend on a tile."""
        names = ("window", "channels_in", "channels_out", "groups", "live_in", "live_out", "residual", "activation")
        return {name: getattr(self, name) for name in (*names, "zero_dead", "dtype")}

    @property
    def masks(self) -> tuple[bool, bool, tuple[int, int] | None]:
        """The masks of its row plan: frames read, frames wanted, and wanted positions."""
        return self.in_frames, self.out_frames, self.positions

    @property
    def workload(self) -> Workload:
        """What the sizes of its kernel depend on."""
        thinned = {
            "in_frames": self.in_frames,
            "out_frames": self.out_frames,
            "positions": self.positions is not None,
            "in_channels": self.live_in,
            "out_channels": self.live_out,
            "in_positions": self.in_positions is not None,
        }
        lists = tuple(axis for axis, on in thinned.items() if on)
        workload = Workload(
            self.window,
            self.channels_in,
            self.channels_out,
            self.groups,
            lists,
            residual=self.residual,
            activation=self.activation,
            threads=self.threads,
            density=TYPICAL_DENSITY if lists else 1.0,
            dtype=self.dtype,
        )
        return workload if self.columns is None else workload.grouped(self.group, self.kept)

    @staticmethod
    def of(workload: Workload) -> Layer:
        """A layer of this workload; masks over positions differ by frame, as D-STEP's do, and columns are made up."""
        window, lists = workload.window, workload.lists
        return Layer(
            window,
            workload.channels_in,
            workload.channels_out,
            workload.groups,
            in_frames="in_frames" in lists,
            out_frames="out_frames" in lists,
            positions=(window.batch, window.out[0]) if "positions" in lists else None,
            in_positions=(window.batch, window.size[0]) if "in_positions" in lists else None,
            live_in="in_channels" in lists,
            live_out="out_channels" in lists,
            residual=workload.residual,
            activation=workload.activation,
            threads=workload.threads,
            dtype=workload.dtype,
            group=workload.group,
            columns=workload.columns().count if workload.family == KERNEL_GROUPS else None,
            kept=workload.kept,
            spread=workload.spread,
            planar=workload.family == PLANAR,
        )


K = TypeVar("K", bound=Kernel, covariant=True)


@dataclass(frozen=True)
class Choice(Generic[K]):
    """A kernel, why it was chosen in one sentence, the record that chose its sizes ("": the defaults), and for which
    workload (None where there is nothing to choose)."""

    kernel: K
    reason: str = ""
    origin: str = ""
    workload: Workload | None = None
