"""Video files as frames."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dance_tvm.core.errors import DanceError


class Video(Protocol):
    """A video to read: a path, or a member of a shard."""

    def is_file(self) -> bool:
        """Whether it is there."""

    def open(self, mode: str) -> Any:
        """Its bytes."""


def require_av() -> None:
    """Raise DanceError where videos cannot be decoded."""
    if find_spec("av") is None:
        raise DanceError("reading videos needs PyAV; install it with: pip install 'dance-tvm[train]'")


def read_video(path: Video, height: int, width: int) -> np.ndarray:
    """All frames (T, height, width, 3) as bytes. Raises DanceError when the file is missing or no readable video."""
    require_av()
    import av

    if not path.is_file():
        raise DanceError(f"the video {path} is missing; check the path")
    try:
        with av.open(str(path) if isinstance(path, Path) else path.open("rb")) as container:
            frames = [_upright(frame, height, width) for frame in container.decode(container.streams.video[0])]
    except (av.FFmpegError, IndexError) as error:
        said = getattr(error, "strerror", None) or error
        raise DanceError(f"{path} cannot be decoded ({said}); it is corrupt or not a video: replace it") from error
    if not frames:
        raise DanceError(f"{path} holds no frame; it is corrupt: replace it")
    return np.stack(frames)


def _upright(frame: Any, height: int, width: int) -> np.ndarray:
    """A frame (height, width, 3) as players show it: a phone that is held upright records it on its side, with the
    angle beside it."""
    turns = round(frame.rotation / 90) % 4
    if turns % 2:
        height, width = width, height
    return np.rot90(frame.reformat(width, height, "rgb24").to_ndarray(), turns)
