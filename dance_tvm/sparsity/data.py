"""What a `--data` argument names.

A clip is a float32 tensor (C, T, H, W). `--data` takes a name and options, `NAME[:PATH][,KEY=VALUE…]`:

    motion-digits                      real handwritten digits that move in eight ways; the label is the motion
    motion-digits,train=2000,size=32   with another number of clips or edge length
    ucf101:/data/UCF-101,split=1       folders and split files of UCF101 (PyAV reads the videos)
    hmdb51:/data/hmdb51,split=1        the same for HMDB51
    folder:/data/mine                  a folder of videos for each class, below train/ and val/ or side by side
    csv:/data/train.csv,test=val.csv   lines of video,class; without test= a fifth of each class is held out
    webdataset:/data/clips-{000..009}.tar   shards of NAME.mp4 with NAME.cls; a folder or one .tar is taken too
    transnet:a.mp4,window=50           windows of one or more videos (joined by '+'), for label-free distillation

`load_data` returns `Splits`: training and held-out clips that share no clip, no handwritten digit and no frame.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.clips import Splits
from dance_tvm.sparsity.listed_video import folder, listed
from dance_tvm.sparsity.motion_digits import motion_digits
from dance_tvm.sparsity.shards import webdataset
from dance_tvm.sparsity.video import hmdb51, transnet, ucf101


def load_data(spec: str, *, model: str = "", seed: int = 0) -> Splits:
    """The clips that a `--data` argument names; `model` settles the normalisation of real videos.

    Raises DanceError for an unknown name or option, a missing folder, or a folder of another layout.
    """
    head, *pairs = spec.split(",")
    name, _, path = head.partition(":")
    if name not in _READERS:
        raise DanceError(f"there are no clips called {name!r}; choose one of {', '.join(_READERS)}")
    options: dict[str, int | str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise DanceError(f"{pair!r} in --data {spec!r} is not of the form key=value")
        options[key] = int(value) if value.lstrip("-").isdigit() else value
    try:
        return _READERS[name](path, model, seed, **options)
    except TypeError as error:
        raise DanceError(f"--data {spec!r} has an option that {name} does not take ({error})") from error


def _of_path(name: str, read: Callable[..., Splits]) -> Callable[..., Splits]:
    """A reader of the folder or file that stands behind the name."""

    def reader(path: str, model: str, seed: int, **options: Any) -> Splits:
        return read(Path(_required(name, path)), model, seed, **options)

    return reader


def _required(name: str, path: str) -> str:
    if not path:
        raise DanceError(f"--data {name} needs a path: {name}:PATH")
    return path


_READERS: dict[str, Callable[..., Splits]] = {
    "motion-digits": motion_digits,
    "ucf101": _of_path("ucf101", ucf101),
    "hmdb51": _of_path("hmdb51", hmdb51),
    "folder": _of_path("folder", folder),
    "csv": _of_path("csv", listed),
    "webdataset": _of_path("webdataset", webdataset),
    "transnet": lambda path, model, seed, **options: transnet(_required("transnet", path), model, seed, **options),
}
