"""How frames of a video become a network's input: size, crop, scale and rate, read from a TOML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dance_tvm.core.errors import DanceError
from dance_tvm.core.faults import place_of, said_of
from dance_tvm.core.text_files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Preprocess(BaseModel):
    """``resize`` is (height, width) before the centre is cropped to the input's size (none: straight to that size);
    bytes are divided by ``divisor``, ``mean`` is taken off and ``deviation`` divided by, channel by channel; of the
    video every ``every``-th frame is taken."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    resize: tuple[int, int] | None = None
    divisor: float = Field(255.0, gt=0)
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)
    every: int = Field(1, ge=1)

    @field_validator("mean", "deviation")
    @classmethod
    def _for_colours(cls, numbers: tuple[float, ...]) -> tuple[float, ...]:
        if len(numbers) not in (1, 3):
            raise ValueError(f"{len(numbers)} numbers for frames of three colours: give three, or one for all")
        return numbers

    @field_validator("deviation")
    @classmethod
    def _divides(cls, numbers: tuple[float, ...]) -> tuple[float, ...]:
        if min(numbers) <= 0:
            raise ValueError("is divided by: give numbers above zero")
        return numbers

    @property
    def keeps_bytes(self) -> bool:
        """Whether no scale is given, or one that leaves bytes as they are."""
        return self.divisor in (1.0, 255.0) and set(self.mean) == {0.0} and set(self.deviation) == {1.0}

    def scaled(self, window: np.ndarray) -> np.ndarray:
        """(T, H, W, 3) bytes as float32 in the network's scale."""
        values = window.astype("float32") / np.float32(self.divisor)
        return (values - np.array(self.mean, "float32")) / np.array(self.deviation, "float32")

    def cropped(self, frames: np.ndarray, height: int, width: int) -> np.ndarray:
        """The middle of frames (T, H, W, 3)."""
        top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
        return frames[:, top : top + height, left : left + width]


def read_preprocess(path: Path) -> Preprocess:
    """Read the file. Raises DanceError where it is none or a field is wrong."""
    if not path.exists():
        raise DanceError(f"there is no file {path} (--preprocess): check the path")
    try:
        fields = tomllib.loads(read_text(path, f"--preprocess {path}"))
    except tomllib.TOMLDecodeError as error:
        raise DanceError(f"--preprocess {path} cannot be read as TOML: {error}") from None
    return preprocess_of(fields, f"--preprocess {path}: ")


def preprocess_of(fields: Mapping[str, Any], place: str) -> Preprocess:
    """Check the fields. Raises DanceError, which begins with the ``place`` they stand in, where one is wrong."""
    try:
        return Preprocess.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        known = "" if first["type"] == "value_error" else f"; the fields are {', '.join(Preprocess.model_fields)}"
        said = "there is no such field" if first["type"] == "extra_forbidden" else said_of(first)
        raise DanceError(f"{place}{place_of(first)}: {said}{known}") from None
