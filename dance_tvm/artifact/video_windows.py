"""A video's frames as windows, each an input of the network."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dance_tvm.artifact.folder import Manifest, Tensor
from dance_tvm.artifact.preprocess import Preprocess
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.video_files import read_video, require_av

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
VIDEOS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v"}
#: Data sets of real videos, whose scale follows from the network's name as well.
VIDEO_SETS = ("ucf101:", "hmdb51:")
# What the meaning of an input says of its scale (dance_tvm.models); an exported graph's says neither.
UP_TO_ONE, AS_TRAINED = "values 0 to 1", "normalised as in training"
#: Types of input that take a picture's bytes as they are, in the network's own scale.
_WHOLE_NUMBERS = {"uint8", "int16", "int32", "int64"}
_MEAN, _DEVIATION = np.array([0.485, 0.456, 0.406], "float32"), np.array([0.229, 0.224, 0.225], "float32")

#: Inputs by the name of the window.
Windows = list[tuple[str, dict[str, np.ndarray]]]


def windows_of(
    path: Path, manifest: Manifest, stride: int | None = None, preprocess: Preprocess | None = None
) -> Windows:
    """Windows of a video, or of a folder of pictures that are its frames in the order of their names, by name.

    ``stride`` is how many frames lie from window to window (a window's length unless given); ``preprocess`` says how
    frames become the input, in place of what the artifact says. Raises DanceError where path or network do not fit;
    warns (DanceWarning) where the scale is a guess.
    """
    require_video_input(manifest, preprocess)
    preprocess = preprocess or manifest.preprocess
    if preprocess is None and (doubt := doubt_of_scale(str(path), manifest)):
        warnings.warn(doubt.replace("--clips", "--preprocess, or --inputs"), DanceWarning, stacklevel=2)
    return list(cut_windows(path, manifest, stride, preprocess))


def cut_windows(
    path: Path, manifest: Manifest, stride: int | None, preprocess: Preprocess | None
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """What `windows_of` gives, one by one and without a warning."""
    tensor = manifest.inputs[0]
    for name, window in _cut(_read_frames(path, tensor, preprocess), path.stem, tensor, stride):
        yield name, {tensor.name: _as_input(window, tensor, manifest.name, preprocess)}


def require_video_input(manifest: Manifest, preprocess: Preprocess | None = None) -> None:
    """Raise DanceError where frames of a video, prepared so, cannot be the network's input, or none can be decoded."""
    require_av()
    if len(manifest.inputs) != 1:
        raise DanceError(f"{manifest.name} takes {len(manifest.inputs)} inputs: a video makes one")
    tensor, chosen = manifest.inputs[0], preprocess or manifest.preprocess
    if len(tensor.shape) != 5 or tensor.shape[0] != 1:
        raise DanceError(f"input {tensor.name} has shape {tuple(tensor.shape)}, and videos make one clip of 5 axes")
    _require_frames(tensor)
    if chosen is not None:
        require_prepared([tensor], chosen)


def _require_frames(tensor: Tensor) -> None:
    """Raise DanceError where an input of five axes cannot hold the frames of a video, in colour or grey."""
    if "float" not in tensor.dtype and tensor.dtype not in _WHOLE_NUMBERS:
        raise DanceError(f"input {tensor.name} is {tensor.dtype}, which cannot hold the bytes of a video's frames")
    if not frames_last(tensor) and tensor.shape[1] not in (1, 3):
        raise DanceError(
            f"input {tensor.name} has {tensor.shape[1]} channels, and frames of a video have 3, or 1 in grey"
        )


def require_prepared(inputs: Iterable[Tensor], preprocess: Preprocess) -> None:
    """Raise DanceError where frames that are prepared so cannot be an input of five axes."""
    for tensor in inputs:
        if len(tensor.shape) != 5:
            continue
        _require_frames(tensor)
        size, resize = _size(tensor), preprocess.resize
        if resize is not None and (resize[0] < size[0] or resize[1] < size[1]):
            raise DanceError(f"--preprocess: frames of {resize} are smaller than the input's {size}")
        if tensor.dtype in _WHOLE_NUMBERS and not preprocess.keeps_bytes:
            raise DanceError(
                f"--preprocess: input {tensor.name} takes a frame's bytes as {tensor.dtype}, and the network scales "
                f"them: leave divisor, mean and deviation out"
            )


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder by their names. Raises DanceError where it holds none."""
    pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not pictures:
        raise DanceError(f"{folder} holds no picture ({', '.join(sorted(PICTURES))})")
    return pictures


def _size(tensor: Tensor) -> tuple[int, int]:
    """Height and width of a video's input."""
    height, width = tensor.shape[2:4] if frames_last(tensor) else tensor.shape[3:5]
    return height, width


def _read_frames(path: Path, tensor: Tensor, preprocess: Preprocess | None) -> np.ndarray:
    """Frames (T, H, W, 3) as bytes, of the size that the input takes."""
    height, width = _size(tensor)
    read_at = (preprocess.resize if preprocess else None) or (height, width)
    if path.is_dir():
        frames = np.concatenate([read_video(picture, *read_at)[:1] for picture in pictures_in(path)])
    else:
        frames = read_video(path, *read_at)
    return preprocess.cropped(frames[:: preprocess.every], height, width) if preprocess else frames


def _cut(frames: np.ndarray, name: str, tensor: Tensor, stride: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Windows as long as the input takes; a video that is shorter holds its last frame."""
    count = tensor.shape[frames_axis(tensor)]
    for start in range(0, max(1, len(frames) - count + 1), stride or count):
        window = frames[start : start + count]
        yield f"{name} {start}-{start + len(window)}", window[np.minimum(np.arange(count), len(window) - 1)]


def _as_input(window: np.ndarray, tensor: Tensor, model: str, preprocess: Preprocess | None) -> np.ndarray:
    """(T, H, W, 3) bytes as the network's input: an input of whole numbers takes the bytes, others what ``preprocess``
    says. Without it C3D sees 0 to 255, others ImageNet's scale, unless the input's meaning says 0 to 1."""
    if tensor.dtype in _WHOLE_NUMBERS:
        values = window
    elif preprocess is not None:
        values = preprocess.scaled(window)
    elif UP_TO_ONE in tensor.meaning:
        values = window.astype("float32") / 255
    elif _takes_pixels(model):
        values = window.astype("float32")
    else:
        values = (window.astype("float32") / 255 - _MEAN) / _DEVIATION
    if frames_last(tensor):
        return np.ascontiguousarray(values[None]).astype(tensor.dtype)
    values = np.moveaxis(values, -1, 0)
    if tensor.shape[1] == 1:
        grey = values.mean(0, keepdims=True)
        values = np.rint(grey) if tensor.dtype in _WHOLE_NUMBERS else grey
    return np.ascontiguousarray(values[None]).astype(tensor.dtype)


def doubt_of_scale(spec: str, manifest: Manifest) -> str:
    """One sentence where the artifact does not say in which scale it takes the frames of videos; else empty."""
    tensor = manifest.inputs[0]
    scaled = tensor.dtype in _WHOLE_NUMBERS or UP_TO_ONE in tensor.meaning or AS_TRAINED in tensor.meaning
    if scaled or manifest.preprocess is not None or not (holds_videos(Path(spec)) or spec.startswith(VIDEO_SETS)):
        return ""
    guess = "0 to 255" if _takes_pixels(manifest.name) else "ImageNet's scale"
    return (
        f"{manifest.name} does not say in which scale it takes videos, and {guess} is a guess: trained on another, it "
        f"computes nonsense, and one that decides by clip may leave nearly everything out; "
        f"give --clips an .npz of clips scaled as in its training"
    )


def frames_last(tensor: Tensor) -> bool:
    """Whether the input is (N, T, H, W, C) rather than (N, C, T, H, W)."""
    return tensor.shape[-1] == 3 and tensor.shape[1] != 3


def holds_videos(path: Path) -> bool:
    """Whether ``path`` is a video or a folder."""
    return path.is_dir() or path.suffix.lower() in VIDEOS


def _takes_pixels(model: str) -> bool:
    return model.startswith("c3d")


def frames_axis(tensor: Tensor) -> int:
    """Which axis of the input counts frames."""
    return 1 if frames_last(tensor) else 2
