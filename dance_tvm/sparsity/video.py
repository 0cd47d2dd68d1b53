"""Clips from video files: UCF101 and HMDB51 folders with their split files, and TransNetV2's windows.

Preprocessing is the DANCE supplement's (section 10): 16 frames, every fourth; resized to 128 x 171, the middle
112 x 112 cropped; C3D sees pixels of 0 to 255, other networks ImageNet's mean and deviation. Training clips start at a
random frame, and are mirrored and changed in brightness and contrast by chance except for C3D.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dance_tvm.core.errors import DanceError
from dance_tvm.core.text_files import read_text
from dance_tvm.core.video_files import Video, read_video
from dance_tvm.sparsity.clips import Splits

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How a video becomes a clip (3, frames, crop, crop). `pixels` keeps 0 to 255, as C3D takes them."""

    frames: int = 16
    stride: int = 4
    height: int = 128
    width: int = 171
    crop: int = 112
    pixels: bool = False

    def normalised(self, clip: np.ndarray) -> Tensor:
        """(T, H, W, 3) bytes or floats of 0 to 255 to (3, T, H, W) float32."""
        values = torch.from_numpy(np.ascontiguousarray(clip)).permute(3, 0, 1, 2).float()
        if self.pixels:
            return values
        mean, deviation = (torch.tensor(three)[:, None, None, None] for three in (_IMAGENET_MEAN, _IMAGENET_DEVIATION))
        return (values / 255 - mean) / deviation


class VideoClips:
    """One clip a video. Training clips vary with `set_epoch`; held-out ones are the middle of the video, unchanged."""

    def __init__(
        self,
        videos: Sequence[tuple[Video, int]],
        classes: tuple[str, ...],
        how: Preprocessing,
        *,
        seed: int = 0,
        augment: bool = False,
    ) -> None:
        missing = [path for path, _ in videos if not path.is_file()]
        if missing:
            raise DanceError(f"{len(missing)} listed videos are missing, the first is {missing[0]}; unpack all of them")
        if not videos:
            raise DanceError("the split lists no video; check the split file and the folder of videos")
        self.classes = classes
        self.shape: tuple[int, int, int, int] = (3, how.frames, how.crop, how.crop)
        self._videos, self._how, self._seed, self._augment, self._epoch = videos, how, seed, augment, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._videos[index]
        how = self._how
        frames = read_video(path, how.height, how.width)
        if len(frames) < how.frames:
            raise DanceError(
                f"{path} has {len(frames)} frames and a clip needs {how.frames}; leave it out of the split"
            )
        stride = min(how.stride, (len(frames) - 1) // (how.frames - 1))
        room = len(frames) - (how.frames - 1) * stride
        random = np.random.default_rng([self._seed, self._epoch, index])
        start = int(random.integers(room)) if self._augment else room // 2
        clip = frames[start : start + (how.frames - 1) * stride + 1 : stride]
        top, left = (how.height - how.crop) // 2, (how.width - how.crop) // 2
        clip = clip[:, top : top + how.crop, left : left + how.crop]
        if self._augment and not how.pixels:
            clip = _varied(clip, random)
        return how.normalised(clip), label


def ucf101(path: Path, model: str, seed: int, *, split: int = 1, frames: int = 16, stride: int = 4) -> Splits:
    """UCF101: `path`/CLASS/v_CLASS_gXX_cYY.avi with classInd.txt, trainlist0S.txt and testlist0S.txt.

    The lists may lie in `path`, in its ucfTrainTestlist or beside it.
    """
    lists = _folder_with("classInd.txt", path, "UCF101")
    classes = tuple(line.split()[1] for line in _lines(lists / "classInd.txt"))
    videos = {}
    for part in ("train", "test"):
        names = [line.split()[0] for line in _lines(lists / f"{part}list{split:02}.txt")]
        videos[part] = [(path / name, _class_of(name.split("/")[0], classes, lists)) for name in names]
    return splits_of("ucf101", videos["train"], videos["test"], classes, model, seed, frames, stride)


def hmdb51(path: Path, model: str, seed: int, *, split: int = 1, frames: int = 16, stride: int = 4) -> Splits:
    """HMDB51: `path`/CLASS/*.avi with CLASS_test_splitS.txt, whose lines are `NAME 0|1|2` (1 trains, 2 tests).

    The lists may lie in `path`, in its testTrainMulti_7030_splits or beside it.
    """
    pattern = re.compile(rf"(.+)_test_split{split}\.txt")
    lists = _folder_with(f"*_test_split{split}.txt", path, "HMDB51")
    matches = (pattern.fullmatch(file.name) for file in lists.iterdir())
    classes = tuple(sorted(match[1] for match in matches if match))
    train: list[tuple[Path, int]] = []
    test: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        for line in _lines(lists / f"{name}_test_split{split}.txt"):
            video, part = line.rsplit(maxsplit=1)
            {"1": train, "2": test}.get(part, []).append((path / name / video, label))
    return splits_of("hmdb51", train, test, classes, model, seed, frames, stride)


class FrameWindows:
    """Windows (T, 27, 48, 3) of bytes as TransNetV2 takes them; there is no label (it is always 0)."""

    classes: tuple[str, ...] = ("boundary",)

    def __init__(self, parts: Sequence[np.ndarray], window: int, step: int, most: int = 0) -> None:
        self.shape: tuple[int, int, int, int] = (window, *parts[0].shape[1:])
        self._windows = [
            part[start : start + window] for part in parts for start in range(0, len(part) - window + 1, step)
        ]
        if not self._windows:
            raise DanceError(f"the videos are shorter than a window of {window} frames; choose a smaller window")
        if 0 < most < len(self._windows):
            self._windows = [self._windows[place * len(self._windows) // most] for place in range(most)]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.ascontiguousarray(self._windows[index])), 0


def transnet(
    path: str, model: str, seed: int, *, window: int = 100, step: int = 25, held_out: int = 25, most: int = 0
) -> Splits:
    """Windows of the videos in `path` (joined by '+'; "published" is TransNetV2's own test clip).

    The last `held_out` percent of each video are held out, whole: no frame is in both splits. With `most`, an even
    choice of that many windows trains and of half as many is held out.
    """
    from dance_tvm.models import transnetv2

    train, test = [], []
    for name in path.split("+"):
        frames = transnetv2.read_frames(transnetv2.clip_path() if name == "published" else Path(name))
        border = len(frames) * (100 - held_out) // 100
        train.append(frames[:border])
        test.append(frames[border:])
    seen, unseen = FrameWindows(train, window, step, most), FrameWindows(test, window, window, most // 2)
    return Splits("transnet", seen, unseen, "distillation")


def splits_of(
    name: str,
    train: Sequence[tuple[Video, int]],
    test: Sequence[tuple[Video, int]],
    classes: tuple[str, ...],
    model: str,
    seed: int,
    frames: int,
    stride: int,
) -> Splits:
    """Training clips that vary and held-out ones that do not, of videos with their classes' numbers."""
    how = Preprocessing(frames=frames, stride=stride, pixels=model.startswith("c3d"))
    return Splits(name, VideoClips(train, classes, how, seed=seed, augment=True), VideoClips(test, classes, how))


def _folder_with(pattern: str, path: Path, layout: str) -> Path:
    if not path.is_dir():
        raise DanceError(f"{path} is not a folder; name the folder that holds {layout}'s class folders")
    for folder in (path, *sorted(path.iterdir()), *sorted(path.parent.iterdir())):
        if folder.is_dir() and next(folder.glob(pattern), None):
            return folder
    raise DanceError(f"{path} has not the layout of {layout}: no {pattern} in it, below it or beside it")


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DanceError(f"the split file {path} is missing; unpack it or choose another split")
    return [line for line in read_text(path, f"the split file {path}").splitlines() if line.strip()]


def _class_of(name: str, classes: tuple[str, ...], lists: Path) -> int:
    if name not in classes:
        raise DanceError(f"the split lists a video of class {name!r}, which {lists / 'classInd.txt'} does not name")
    return classes.index(name)


def _varied(clip: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Mirrored by chance, brightness and contrast changed by up to a fifth: (T, H, W, 3) floats of 0 to 255."""
    varied = clip[:, :, ::-1] if random.uniform() < 0.5 else clip
    values = varied.astype(np.float32)
    mean = values.mean()
    contrast, brightness = random.uniform(0.8, 1.2, 2)
    return np.asarray(((values - mean) * contrast + mean * brightness).clip(0, 255), np.float32)
