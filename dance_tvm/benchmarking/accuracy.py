"""How often an artifact is right about labelled clips."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dance_tvm.artifact.folder import Manifest, Tensor
from dance_tvm.artifact.video_windows import VIDEOS
from dance_tvm.benchmarking.clips import NamedClips
from dance_tvm.benchmarking.results import Accuracy
from dance_tvm.core.errors import DanceError
from dance_tvm.core.text_files import read_text
from dance_tvm.device import LoadedNetwork

_FEW = 5


def read_classes(path: Path) -> dict[str, int]:
    """The class of each clip: lines of ``name,class`` with a number as the class, a head line or not.

    A video's name may have its ending and folder.

    Raises DanceError where the file cannot be read or holds something else.
    """
    rows = [row for row in csv.reader(read_text(path, f"--truth {path}").splitlines()) if row]
    classes: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        name, label = row[0].strip(), row[-1].strip()
        if label.isdecimal() and len(row) == 2:
            classes[Path(name).stem if Path(name).suffix.lower() in VIDEOS else name] = int(label)
        elif number > 1 or len(row) != 2:
            said = "write the clip's name, a comma and its class's number (names of classes are for `run --labels`)"
            raise DanceError(f"--truth {path}, line {number}: {said}")
    if not classes:
        raise DanceError(f"--truth {path} names no clip: write lines of name,class")
    return classes


def accuracy(
    network: LoadedNetwork, manifest: Manifest, clips: NamedClips, classes: Mapping[str, int], of: str
) -> Accuracy:
    """Share of clips, and of videos by the mean score of their clips, whose class comes first, or among the first five.

    Raises DanceError where the network gives no scores or no clip is labelled.
    """
    tensor = scores_of(manifest)
    require_labelled(clips, classes, of)
    scores: dict[str, list[np.ndarray]] = defaultdict(list)
    hits: list[tuple[bool, bool]] = []
    for name, inputs in clips:
        video = _video(name, classes)
        if video is None:
            continue
        found = network.run(inputs)[tensor.name][0]
        if classes[video] >= len(found):
            raise DanceError(f"--truth: {video} is of class {classes[video]}, and {manifest.name} knows {len(found)}")
        scores[video].append(found)
        hits.append(_hit(found, classes[video]))
    videos = [_hit(np.mean(found, axis=0), classes[video]) for video, found in scores.items()]
    return Accuracy(
        labels=of,
        clips=len(hits),
        top1=float(np.mean([first for first, _ in hits])),
        top5=float(np.mean([five for _, five in hits])),
        videos=len(videos),
        video_top1=float(np.mean([first for first, _ in videos])),
        video_top5=float(np.mean([five for _, five in videos])),
    )


def require_labelled(clips: NamedClips, classes: Mapping[str, int], of: str) -> None:
    """Raise DanceError where none of the clips has a class."""
    if not any(_video(name, classes) for name, _ in clips):
        raise DanceError(f"--truth {of} names none of the clips: they are called {_some(clips)}")


def _video(name: str, classes: Mapping[str, int]) -> str | None:
    """What the labels call a clip: its own name, or that of the video or array that it is a part of."""
    return next((each for each in (name, _whole(name)) if each in classes), None)


def _whole(name: str) -> str:
    return name.rpartition(" ")[0] or name.partition("[")[0]


def scores_of(manifest: Manifest) -> Tensor:
    """The output that holds a clip's class scores. Raises DanceError where there is none."""
    for tensor in manifest.outputs:
        if len(tensor.shape) == 2 and tensor.shape[0] == 1 and tensor.shape[1] > 1:
            return tensor
    shapes = ", ".join(f"{tensor.name} {tuple(tensor.shape)}" for tensor in manifest.outputs)
    raise DanceError(f"--truth needs an output of (1, classes), and {manifest.name} gives {shapes}")


def _hit(scores: np.ndarray, label: int) -> tuple[bool, bool]:
    order = np.argsort(-scores, kind="stable")
    return bool(order[0] == label), bool(label in order[:_FEW])


def _some(clips: NamedClips) -> str:
    names = list(dict.fromkeys(_whole(name) or name for name, _ in clips))
    return ", ".join(map(repr, names[:3])) + (" and so on" if len(names) > 3 else "")
