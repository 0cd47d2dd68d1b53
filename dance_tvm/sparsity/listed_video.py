"""Clips of a user's own videos: a folder for each class, or a list with a class for each video."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from dance_tvm.core.errors import DanceError
from dance_tvm.core.text_files import read_text
from dance_tvm.core.video_files import Video
from dance_tvm.sparsity.clips import Splits
from dance_tvm.sparsity.video import splits_of

VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v"}
_HELD_OUT = ("val", "test", "validation")
Videos = Sequence[tuple[Video, int]]
Rows = Sequence[tuple[Video, str]]


def folder(path: Path, model: str, seed: int, *, held_out: int = 20, frames: int = 16, stride: int = 4) -> Splits:
    """`path`/train/CLASS/* with `path`/val/CLASS/* (or test), else `path`/CLASS/* of which `held_out` percent are held
    out, spread evenly over each class. Raises DanceError where there is nothing of the kind."""
    if not path.is_dir():
        raise DanceError(f"{path} is not a folder; name the folder that holds a folder of videos for each class")
    train = path / "train"
    if not train.is_dir():
        classes = _classes(path)
        return _divided("folder", _found(path, classes), classes, model, seed, held_out, frames, stride)
    other = next((path / name for name in _HELD_OUT if (path / name).is_dir()), None)
    if other is None:
        raise DanceError(
            f"{path} has train and none of {', '.join(_HELD_OUT)}; add one, or lay the classes side by side"
        )
    classes = _classes(train)
    return splits_of("folder", _found(train, classes), _found(other, classes), classes, model, seed, frames, stride)


def listed(
    path: Path, model: str, seed: int, *, test: str = "", held_out: int = 20, frames: int = 16, stride: int = 4
) -> Splits:
    """A CSV of `video,class` lines, paths as seen from its folder; `test` names another of what is held out, else
    `held_out` percent of each class are. Raises DanceError for a line of another form."""
    others = _rows(path.parent / test) if test else []
    return labelled("csv", path, _rows(path), test, others, model, seed, held_out, frames, stride)


def labelled(
    name: str, path: Path, rows: Rows, test: str, others: Rows, model: str, seed: int, held_out: int, frames: int,
    stride: int,
) -> Splits:  # fmt: skip
    """Videos with the names of their classes, ``rows`` of ``path``; ``others`` of ``test`` are held out where it is
    given."""
    # By number where classes are numbers, so that 10 does not come before 2.
    classes = tuple(
        sorted({label for _, label in rows}, key=lambda label: label.zfill(9) if label.isdigit() else label)
    )
    unknown = [label for _, label in others if label not in classes]
    if unknown:
        raise DanceError(f"{test} has the class {unknown[0]!r}, which {path} has not; train on every class")
    videos, unseen = ([(video, classes.index(label)) for video, label in each] for each in (rows, others))
    if test:
        return splits_of(name, videos, unseen, classes, model, seed, frames, stride)
    return _divided(name, videos, classes, model, seed, held_out, frames, stride)


def _rows(path: Path) -> list[tuple[Path, str]]:
    rows = [row for row in csv.reader(read_text(path, f"the list {path}").splitlines()) if row]
    if rows and [cell.strip().lower() for cell in rows[0]] in (["video", "class"], ["path", "label"]):
        rows = rows[1:]
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not all(cell.strip() for cell in row):
            raise DanceError(f"{path}, video {number}: {','.join(row)!r} is not of the form video,class")
    return [(path.parent / row[0].strip(), row[1].strip()) for row in rows]


def _classes(path: Path) -> tuple[str, ...]:
    found = tuple(sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")))
    if not found:
        raise DanceError(f"{path} holds no folder; lay the videos of each class into a folder of its name")
    return found


def _found(path: Path, classes: tuple[str, ...]) -> Videos:
    strange = [each.name for each in path.iterdir() if each.is_dir() and each.name not in classes]
    if strange:
        raise DanceError(f"{path} has the class {strange[0]!r}, which train has not; train on every class")
    return [
        (video, label)
        for label, name in enumerate(classes)
        for video in sorted((path / name).rglob("*"))
        if video.suffix.lower() in VIDEO_SUFFIXES
    ]


def _divided(
    name: str, videos: Videos, classes: tuple[str, ...], model: str, seed: int, held_out: int, frames: int, stride: int
) -> Splits:
    """Every so many-th video of each class is held out, so that all classes are in both splits."""
    if not 0 < held_out < 100:
        raise DanceError(f"held_out={held_out} must be a percentage between 1 and 99")
    train: list[tuple[Video, int]] = []
    test: list[tuple[Video, int]] = []
    for label in range(len(classes)):
        of_class = [video for video in videos if video[1] == label]
        for place, video in enumerate(of_class):
            last = place * held_out // 100 != (place + 1) * held_out // 100
            (test if last else train).append(video)
    if not test and train:
        raise DanceError(f"{name}: no class has enough videos for {held_out}% of them to be one; raise held_out")
    return splits_of(name, train, test, classes, model, seed, frames, stride)
