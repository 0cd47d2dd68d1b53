"""Clips in WebDataset shards: tar files whose members `NAME.mp4` and `NAME.cls` are a video and its class."""

from __future__ import annotations

import io
import re
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.clips import Splits
from dance_tvm.sparsity.listed_video import VIDEO_SUFFIXES, labelled

#: Members that name a sample's class: a number or a word.
_CLASSES = (".cls", ".txt")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Member:
    """A file within a tar file, read where it lies."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def is_file(self) -> bool:
        """Whether its shard is still there."""
        return self.shard.is_file()

    def open(self, _mode: str = "rb") -> BinaryIO:
        """Its bytes."""
        with self.shard.open("rb") as stream:
            stream.seek(self.offset)
            return io.BytesIO(stream.read(self.size))


def webdataset(
    path: Path, model: str, seed: int, *, test: str = "", held_out: int = 20, frames: int = 16, stride: int = 4
) -> Splits:
    """The shards that ``path`` names: a tar file, a folder of them, or ``clips-{000..009}.tar``; ``test`` names others,
    beside it, that are held out, else ``held_out`` percent of each class are. Raises DanceError for a sample without
    video or class."""
    others = _samples(path.parent / test) if test else []
    return labelled("webdataset", path, _samples(path), test, others, model, seed, held_out, frames, stride)


def _samples(path: Path) -> list[tuple[Member, str]]:
    """Each sample's video and class, in the order of the shards."""
    found = []
    for shard in _shards(path):
        parts: dict[str, dict[str, Member]] = defaultdict(dict)
        try:
            with tarfile.open(shard) as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    key, dot, suffix = name.partition(".")  # as WebDataset splits names: at the first dot
                    if member.isfile() and key:
                        place = Member(shard, member.name, member.offset_data, member.size)
                        parts[f"{folder}/{key}"][f"{dot}{suffix}".lower()] = place
        except (OSError, tarfile.TarError) as error:
            raise DanceError(
                f"the shard {shard} cannot be read ({error}); it is not a tar file, or truncated"
            ) from None
        for key, files in parts.items():
            video = next((place for suffix, place in files.items() if suffix in VIDEO_SUFFIXES), None)
            label = next((files[suffix] for suffix in _CLASSES if suffix in files), None)
            if video is None or label is None:
                lacks = "video" if video is None else f"class ({' or '.join(_CLASSES)})"
                raise DanceError(f"{shard}: the sample {key.lstrip('/')} has no {lacks}")
            found.append((video, label.open().read().decode("utf-8", "replace").strip()))
    return found


def _shards(path: Path) -> list[Path]:
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
    elif match := _RANGE.search(str(path)):
        first, last = match.groups()
        numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        shards = [Path(str(path).replace(match.group(0), number, 1)) for number in numbers]
    else:
        shards = [path]
    if not shards:
        raise DanceError(f"{path} holds no .tar file: name a folder of shards, one of them, or NAME-{{000..009}}.tar")
    return shards
