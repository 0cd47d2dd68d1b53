"""The clips that `--data` and `--clips` may name: known, and looked for, without loading PyTorch."""

from __future__ import annotations

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
    ``options`` are the numbers, and ``test`` the file, that it takes beside."""

    function: str
    path: Literal["none", "folder", "file", "shards", "videos"]
    options: tuple[str, ...]


_CLIPS = ("frames", "stride")

READERS = {
    "motion-digits": Reader(
        "dance_tvm.sparsity.motion_digits:motion_digits", "none", ("train", "test", "size", "frames")
    ),
    "ucf101": Reader("dance_tvm.sparsity.video:ucf101", "folder", ("split", *_CLIPS)),
    "hmdb51": Reader("dance_tvm.sparsity.video:hmdb51", "folder", ("split", *_CLIPS)),
    "folder": Reader("dance_tvm.sparsity.listed_video:folder", "folder", ("held_out", *_CLIPS)),
    "csv": Reader("dance_tvm.sparsity.listed_video:listed", "file", ("test", "held_out", *_CLIPS)),
    "webdataset": Reader("dance_tvm.sparsity.shards:webdataset", "shards", ("test", "held_out", *_CLIPS)),
    "transnet": Reader("dance_tvm.sparsity.video:transnet", "videos", ("window", "step", "held_out", "most")),
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
    if not value.lstrip("-").isdigit():
        raise DanceError(f"{option} {name}: {key} is a whole number, not {value!r}")
    return int(value)
