"""The clips that `--data` and `--clips` may name: known, and looked for, without loading PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dance_tvm.core.errors import DanceError
from dance_tvm.core.video_files import require_av

Options = dict[str, int | str]


@dataclass(frozen=True)
class Reader:
    """Who reads clips of a name: ``function`` is ``module:function``, ``path`` what stands behind the name's colon, and
    ``options`` are the numbers, each with its least and greatest, and ``test`` the file, that it takes beside."""

    function: str
    path: Literal["none", "folder", "file", "shards", "videos"]
    options: Mapping[str, tuple[int, int]]


_ANY = (1, 2**31)
_CLIPS = {"frames": _ANY, "stride": _ANY}
_SPLIT = {"split": (1, 3), **_CLIPS}
_LISTED = {"held_out": (1, 99), **_CLIPS}

READERS = {
    "motion-digits": Reader(
        "dance_tvm.sparsity.motion_digits:motion_digits",
        "none",
        {"train": _ANY, "test": _ANY, "size": (24, 2**31), "frames": (8, 2**31)},
    ),
    "ucf101": Reader("dance_tvm.sparsity.video:ucf101", "folder", _SPLIT),
    "hmdb51": Reader("dance_tvm.sparsity.video:hmdb51", "folder", _SPLIT),
    "folder": Reader("dance_tvm.sparsity.listed_video:folder", "folder", _LISTED),
    "csv": Reader("dance_tvm.sparsity.listed_video:listed", "file", {"test": _ANY, **_LISTED}),
    "webdataset": Reader("dance_tvm.sparsity.shards:webdataset", "shards", {"test": _ANY, **_LISTED}),
    "transnet": Reader(
        "dance_tvm.sparsity.video:transnet",
        "videos",
        {"window": _ANY, "step": _ANY, "held_out": (1, 99), "most": (0, 2**31)},
    ),
}

#: What `transnet:` takes in place of a file: TransNetV2's own test clip.
PUBLISHED = "published"


def parse_data(spec: str, option: str = "--data") -> tuple[Reader, str, Options]:
    """Reader, path and options of `NAME[:PATH][,KEY=VALUE…]`. Raises DanceError, which names the command's ``option``,
    where it is none."""
    head, *pairs = spec.split(",")
    name, _, path = head.partition(":")
    if name not in READERS:
        raise DanceError(f"there are no clips called {name!r}; choose one of {', '.join(READERS)}")
    reader = READERS[name]
    if path and reader.path == "none":
        raise DanceError(f"{name} takes no path, and {path!r} was given")
    if not path and reader.path != "none":
        raise DanceError(f"{option} {name} needs a path: {name}:PATH")
    options: Options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise DanceError(f"{pair!r} in {option} {spec!r} is not of the form key=value")
        if key not in reader.options:
            raise DanceError(f"{option} {spec!r}: {name} takes {', '.join(reader.options)}, not {key}")
        if key in options:
            raise DanceError(f"{option} {spec!r} gives {key} twice: give it once")
        options[key] = _value(name, key, value, option)
    return reader, path, options


def require_packages(reader: Reader) -> None:
    """Raise DanceError where the package that makes or decodes the clips is not installed."""
    if reader.path == "none" and find_spec("sklearn") is None:
        raise DanceError("motion digits need scikit-learn; install it with: pip install 'dance-tvm[train]'")
    if reader.path != "none":
        require_av()


def require_data(spec: str, option: str = "--data") -> None:
    """Raise DanceError for clips that have no such name or are not there."""
    reader, path, _ = parse_data(spec, option)
    require_packages(reader)
    place = Path(path)
    if reader.path == "folder" and not place.is_dir():
        raise DanceError(f"{option} {spec}: there is no folder {place}")
    if reader.path == "file" and not place.is_file():
        raise DanceError(f"{option} {spec}: there is no file {place}")
    if reader.path == "shards" and "{" not in path and not place.exists():
        raise DanceError(f"{option} {spec}: there is no folder and no file {place}")
    if reader.path == "videos":
        for name in path.split("+"):
            if name != PUBLISHED and not Path(name).is_file():
                raise DanceError(f"the video {name} is missing; check the path")


def _value(name: str, key: str, value: str, option: str) -> int | str:
    """Of ``test`` a file, except where it counts clips, of all others a number."""
    if key == "test" and READERS[name].path != "none":
        return value
    if not value.lstrip("-").isdecimal():
        raise DanceError(f"{option} {name}: {key} is a whole number, not {value!r}")
    least, greatest = READERS[name].options[key]
    if not least <= int(value) <= greatest:
        within = f"at least {least}" if greatest >= _ANY[1] else f"{least} to {greatest}"
        raise DanceError(f"{option} {name}: {key} is {within}, not {value}")
    return int(value)
