"""What a build decided, layer by layer, and what is known of the functions it compiled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict


class LayerInfo(BaseModel):
    """What was decided for one layer; ``macs`` counts multiply-accumulates of the dense layer in one call.

    The layer is dense in the channels that the build kept: zeros in its weights and masks count, padding too.
    ``tuned`` says which tuning record chose the tile sizes; empty where the defaults did. ``scratch_bytes`` is memory
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


class KernelInfo(BaseModel):
    """One compiled function, as its calls are read.

    ``name`` is the kernel's own, by which layers name it; several functions may have it. ``operands`` are its tensors
    in order. ``tile`` are the frames, rows and columns of a tile of Winograd's, else nothing; of two kernels in one,
    those of the first; ``by_frame``: their lists name each frame as a clip of its own. ``parts``: the kernels that a
    function of joined small ones runs, in order. ``macs``: multiply-accumulates of a call, padding left out, where they
    are the same in every call. ``taps``: of a convolution that asks masks without lists, the taps that each output
    reads inside the clip, along frames, rows and columns; ``pool``: how many of the layer's outputs along each are one
    of the kernel's, which has a pool behind it. ``planar``: its tensors have channels first. ``second``: of
    two kernels in one, the second one's operands, each with its name among ``operands``.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    kind: str = "other"
    operands: list[str] = []
    tile: list[int] = []
    by_frame: bool = False
    parts: list[str] = []
    macs: int | None = None
    taps: list[list[int]] = []
    pool: list[int] = []
    planar: bool = False
    second: dict[str, str] = {}

    @property
    def is_free_choice(self) -> bool:
        """Whether it leaves it to planners which of two kernels of a layer runs."""
        return self.kind == "free choice"

    @property
    def is_planner(self) -> bool:
        """Whether it makes index lists."""
        return self.kind == "planner"


def layers_called(
    layers: Sequence[LayerInfo], kernels: Mapping[str, KernelInfo], symbols: Iterable[str]
) -> Iterator[LayerInfo | None]:
    """For each function called, by its symbol, the layer that it runs alone.

    Layers come in the order of their calls. One that runs within a function of joined small kernels has no call.
    """
    waiting = list(layers)
    for symbol in symbols:
        kernel = kernels.get(symbol, KernelInfo())
        for part in kernel.parts:
            _take(waiting, part)
        yield _take(waiting, kernel.name)


def _take(waiting: list[LayerInfo], kernel: str) -> LayerInfo | None:
    """The next layer with the kernel, which waits no longer."""
    found = next((layer for layer in waiting if layer.kernel == kernel), None)
    if found is not None:
        waiting.remove(found)
    return found
