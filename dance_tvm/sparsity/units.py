"""Units of skipping: how many frames, channels and positions a built network's kernels leave out together.

`dance-tvm units` writes them for a network and a target; training decides one bit a unit, so that what it leaves out
is what kernels can skip, and may be given a budget of the time that the file predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dance_tvm.core.errors import DanceError
from dance_tvm.core.faults import place_of, said_of
from dance_tvm.core.files import written_whole


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteUnits(_Strict):
    """One site's units, each starting at element 0; the last may be cut short.

    `node` names the activation in the network's torch.fx graph, `shape` is its (C, T, H, W).
    """

    node: str
    shape: tuple[int, int, int, int]
    frames: int = Field(ge=1)
    channels: int = Field(ge=1)
    positions: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]

    @property
    def counts(self) -> tuple[int, int, tuple[int, int]]:
        """How many units there are of frames, of channels, and of positions along height and width."""
        channels, frames, height, width = self.shape
        rows, columns = self.positions
        return -(-frames // self.frames), -(-channels // self.channels), (-(-height // rows), -(-width // columns))

    def at_most(self, grid: int) -> SiteUnits:
        """The same with positions in the smallest tiles of whole units of which at most ``grid`` are along an edge."""
        tiles = [
            unit * next(times for times in range(1, size + 1) if -(-size // (unit * times)) <= grid)
            for unit, size in zip(self.positions, self.shape[2:], strict=True)
        ]
        return self.model_copy(update={"positions": tuple(tiles)})


class LayerTimes(_Strict):
    """What a layer is predicted to take, in seconds, where shares of its units are alive along one axis (in and out).

    `layer` is the convolution's name in the network; `frames`, `channels` and `positions` have a time for each of the
    file's `live_shares`.
    """

    layer: str
    kernel: str
    unit_frames: int = Field(ge=1)
    unit_channels: int = Field(ge=1)
    unit_positions: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    frames: tuple[Annotated[float, Field(gt=0)], ...]
    channels: tuple[Annotated[float, Field(gt=0)], ...]
    positions: tuple[Annotated[float, Field(gt=0)], ...]


class Units(_Strict):
    """All of a file; `live_shares` descend from 1."""

    schema_version: Literal[1] = 1
    network: str
    target: str
    threads: int = Field(ge=1)
    sites: tuple[SiteUnits, ...]
    live_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    layers: tuple[LayerTimes, ...] = ()

    @model_validator(mode="after")
    def _check_times(self) -> Units:
        shares = self.live_shares
        if self.layers and (len(shares) < 2 or shares[0] != 1 or list(shares) != sorted(set(shares), reverse=True)):
            raise ValueError("live_shares must be at least two that descend from 1")
        for layer in self.layers:
            if {len(layer.frames), len(layer.channels), len(layer.positions)} != {len(shares)}:
                raise ValueError(f"{layer.layer} must have a time for each of the {len(shares)} live shares")
        return self


class Shaped(Protocol):
    """What a site of a network has."""

    @property
    def node(self) -> str:
        """The activation's name in the torch.fx graph."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The activation's (C, T, H, W)."""


def write_units(units: Units, path: Path, option: str = "--out") -> None:
    """Write the file. Raises DanceError, which names ``option``, where the disk refuses."""
    with written_whole(path, option) as beside:
        beside.write_text(units.model_dump_json(indent=2) + "\n")


def read_units(path: Path) -> Units:
    """The units that ``dance-tvm units --out`` wrote. Raises DanceError for what cannot be read or is none."""
    try:
        return Units.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DanceError(f"{path} cannot be read ({error.strerror}): write it by `dance-tvm units --out`") from None
    except ValidationError as error:
        fault = error.errors()[0]
        said = f"{place_of(fault, 'the file')}: {said_of(fault)}"
        raise DanceError(f"{path} is not a file of units: {said}; `dance-tvm units` writes them") from None


def own_name(name: str) -> str:
    """The name of a layer or site in the network itself, which training without labels wraps (`tasks.Logits`)."""
    return name.removeprefix("network").lstrip("._")


def require_same_sites(units: Sequence[SiteUnits], sites: Sequence[Shaped]) -> None:
    """Raise DanceError unless the units are those of these very sites, in their order."""
    advice = "write the units of this network and clip size by `dance-tvm units`"
    if len(units) != len(sites):
        raise DanceError(f"the units are those of {len(units)} sites, and the network has {len(sites)}: {advice}")
    for unit, site in zip(units, sites, strict=True):
        if (own_name(unit.node), unit.shape) != (own_name(site.node), site.shape):
            raise DanceError(
                f"the units have {unit.node} {list(unit.shape)} where the network has {site.node} {list(site.shape)}: "
                + advice
            )
