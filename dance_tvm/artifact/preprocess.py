"""How frames of a video become a network's input: size, crop, scale and rate, read from a TOML file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dance_tvm.core.errors import DanceError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Preprocess(BaseModel):
    """``resize`` is (height, width) before the centre is cropped to the input's size (none: straight to that size);
    bytes are divided by ``divisor``, ``mean`` is taken off and ``deviation`` divided by, channel by channel; of the
    video every ``every``-th frame is taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resize: tuple[int, int] | None = None
    divisor: float = Field(255.0, gt=0)
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)
    every: int = Field(1, ge=1)

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
    try:
        return Preprocess.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DanceError(f"--preprocess {path} cannot be read as TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(Preprocess.model_fields)
        where = ".".join(map(str, first["loc"]))
        raise DanceError(f"--preprocess {path}: {where}: {first['msg']}; its fields are {known}") from None
