"""Real input: clips out of a folder of videos, an .npz file, or a data set of `dance-tvm train`."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dance_tvm.artifact.folder import Manifest, Tensor
from dance_tvm.artifact.preprocess import Preprocess
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.input_files import read_archive
from dance_tvm.sparsity.data_names import require_av, require_data

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
VIDEOS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v"}
#: Data sets of real videos, whose scale follows from the network's name as well.
VIDEO_SETS = ("ucf101:", "hmdb51:")
MOST_CLIPS = 100
# What the meaning of an input says of its scale (dance_tvm.models); an exported graph's says neither.
UP_TO_ONE, AS_TRAINED = "values 0 to 1", "normalised as in training"
_MEAN, _DEVIATION = np.array([0.485, 0.456, 0.406], "float32"), np.array([0.229, 0.224, 0.225], "float32")

NamedClips = list[tuple[str, dict[str, np.ndarray]]]


def load_clips(spec: str, manifest: Manifest, most: int = MOST_CLIPS) -> NamedClips:
    """Clips by name, each an input of the network. Raises DanceError where the spec or a clip does not fit.

    `spec` is a folder of videos or one video, an .npz file with an array a clip (or one array of many), or what
    `dance-tvm train --data` takes. Warns (DanceWarning) where the scale of videos is a guess.
    """
    require_fitting_clips(spec, manifest)
    tensor, path = manifest.inputs[0], Path(spec)
    if _holds_videos(path):
        found = _videos(path, manifest, most)
    elif path.suffix == ".npz":
        found = _archive(path, tensor, most)
    else:
        found = _data_set(spec, tensor, manifest.name, most)
    if doubt := doubt_of_scale(spec, manifest):
        warnings.warn(doubt, DanceWarning, stacklevel=2)
    return [(name, {tensor.name: array}) for name, array in found]


def require_clips(spec: str) -> None:
    """Raise DanceError where what ``spec`` names is not there, as far as that is known without reading videos or making
    a data set."""
    path = Path(spec)
    if _holds_videos(path):
        _video_files(path)
    elif path.suffix == ".npz":
        read_archive(path)
    else:
        require_data(spec, "--clips")


def require_fitting_clips(spec: str, manifest: Manifest) -> None:
    """Raise DanceError where it is known that the clips, which are there, cannot be the network's input."""
    if len(manifest.inputs) != 1:
        raise DanceError(f"{manifest.name} takes {len(manifest.inputs)} inputs: --clips is for networks with one")
    if _holds_videos(Path(spec)):
        require_video_input(manifest)
    elif Path(spec).suffix == ".npz":
        _archive(Path(spec), manifest.inputs[0], 1)


def doubt_of_scale(spec: str, manifest: Manifest) -> str:
    """One sentence where the artifact does not say in which scale it takes the frames of videos; else empty."""
    tensor = manifest.inputs[0]
    scaled = tensor.dtype == "uint8" or UP_TO_ONE in tensor.meaning or AS_TRAINED in tensor.meaning
    if scaled or manifest.preprocess is not None or not (_holds_videos(Path(spec)) or spec.startswith(VIDEO_SETS)):
        return ""
    guess = "0 to 255" if _takes_pixels(manifest.name) else "ImageNet's scale"
    return (
        f"{manifest.name} does not say in which scale it takes videos, and {guess} is a guess: trained on another, it "
        f"computes nonsense, and one that decides by clip may leave nearly everything out; "
        f"give --clips an .npz of clips scaled as in its training"
    )


def frames_of(manifest: Manifest) -> int:
    """How many frames of video one run takes: batch times frames of its first five-dimensional input, else batch."""
    for tensor in manifest.inputs:
        if len(tensor.shape) == 5:
            return tensor.shape[0] * tensor.shape[_frames_axis(tensor)]
    return manifest.inputs[0].shape[0] if manifest.inputs and manifest.inputs[0].shape else 1


def frames_last(tensor: Tensor) -> bool:
    """Whether the input is (N, T, H, W, C) rather than (N, C, T, H, W)."""
    return tensor.shape[-1] == 3 and tensor.shape[1] != 3


def pictures_of(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The frames of one clip as bytes (T, H, W, 3), for people to look at."""
    video = array[0] if frames_last(tensor) else np.moveaxis(array[0], 0, -1)
    video = video.astype("float32")
    low, high = np.percentile(video, [1, 99])
    scaled = np.clip((video - low) / max(1e-6, high - low), 0, 1) * 255
    return np.repeat(scaled.astype("uint8"), 3 // scaled.shape[-1] if scaled.shape[-1] < 3 else 1, axis=-1)[..., :3]


def strip(frames: np.ndarray, height: int = 72) -> str:
    """Frames (T, H, W, 3) side by side as a base64 JPEG; empty where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return ""
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    row = Image.new("RGB", (width * len(frames), height))
    for index, frame in enumerate(frames):
        row.paste(Image.fromarray(frame).resize((width, height)), (index * width, 0))
    buffer = io.BytesIO()
    row.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _holds_videos(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in VIDEOS


def _takes_pixels(model: str) -> bool:
    return model.startswith("c3d")


def _frames_axis(tensor: Tensor) -> int:
    return 1 if frames_last(tensor) else 2


def _videos(path: Path, manifest: Manifest, most: int) -> list[tuple[str, np.ndarray]]:
    require_video_input(manifest)
    tensor, preprocess = manifest.inputs[0], manifest.preprocess
    clips: list[tuple[str, np.ndarray]] = []
    for file in _video_files(path):
        for name, window in _cut(_read_frames(file, tensor, preprocess), file.stem, tensor, None):
            if len(clips) >= most:
                return clips
            clips.append((name, _as_input(window, tensor, manifest.name, preprocess)))
    return clips


def _video_files(path: Path) -> list[Path]:
    """One video, or those of a folder. Raises DanceError where there is none."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in VIDEOS) if path.is_dir() else [path]
    if not files:
        raise DanceError(f"{path} holds no video ({', '.join(sorted(VIDEOS))})")
    if not files[0].is_file():
        raise DanceError(f"the video {path} is missing; check the path")
    return files


def windows_of(
    path: Path, manifest: Manifest, stride: int | None = None, preprocess: Preprocess | None = None
) -> NamedClips:
    """Windows of a video, or of a folder of pictures that are its frames in the order of their names, by name.

    ``stride`` is how many frames lie from window to window (a window's length unless given); ``preprocess`` says how
    frames become the input, in place of what the artifact says. Raises DanceError where path or network do not fit;
    warns (DanceWarning) where the scale is a guess.
    """
    require_video_input(manifest, preprocess)
    tensor = manifest.inputs[0]
    preprocess = preprocess or manifest.preprocess
    if preprocess is None and (doubt := doubt_of_scale(str(path), manifest)):
        warnings.warn(doubt.replace("--clips", "--preprocess, or --inputs"), DanceWarning, stacklevel=2)
    frames = _read_frames(path, tensor, preprocess)
    return [
        (name, {tensor.name: _as_input(window, tensor, manifest.name, preprocess)})
        for name, window in _cut(frames, path.stem, tensor, stride)
    ]


def require_video_input(manifest: Manifest, preprocess: Preprocess | None = None) -> None:
    """Raise DanceError where frames of a video, prepared so, cannot be the network's input, or none can be decoded."""
    require_av()
    if len(manifest.inputs) != 1:
        raise DanceError(f"{manifest.name} takes {len(manifest.inputs)} inputs: a video makes one")
    tensor, chosen = manifest.inputs[0], preprocess or manifest.preprocess
    if len(tensor.shape) != 5 or tensor.shape[0] != 1:
        raise DanceError(f"input {tensor.name} has shape {tuple(tensor.shape)}, and videos make one clip of 5 axes")
    size, resize = _size(tensor), chosen.resize if chosen else None
    if resize is not None and (resize[0] < size[0] or resize[1] < size[1]):
        raise DanceError(f"--preprocess: frames of {resize} are smaller than the input's {size}")


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
    from dance_tvm.sparsity.video import read_video

    height, width = _size(tensor)
    read_at = (preprocess.resize if preprocess else None) or (height, width)
    if path.is_dir():
        frames = np.concatenate([read_video(picture, *read_at)[:1] for picture in pictures_in(path)])
    else:
        frames = read_video(path, *read_at)
    return preprocess.cropped(frames[:: preprocess.every], height, width) if preprocess else frames


def _cut(frames: np.ndarray, name: str, tensor: Tensor, stride: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Windows as long as the input takes; a video that is shorter holds its last frame."""
    count = tensor.shape[_frames_axis(tensor)]
    for start in range(0, max(1, len(frames) - count + 1), stride or count):
        window = frames[start : start + count]
        yield f"{name} {start}-{start + count}", window[np.minimum(np.arange(count), len(window) - 1)]


def _as_input(window: np.ndarray, tensor: Tensor, model: str, preprocess: Preprocess | None) -> np.ndarray:
    """(T, H, W, 3) bytes as the network's input: as ``preprocess`` says, else bytes stay bytes, C3D sees 0 to 255,
    others ImageNet's scale, unless the meaning of the input says that its values go from 0 to 1."""
    if preprocess is not None:
        values = preprocess.scaled(window)
    elif tensor.dtype == "uint8":
        values = window
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
        values = values.mean(0, keepdims=True)
    return np.ascontiguousarray(values[None]).astype(tensor.dtype)


def _archive(path: Path, tensor: Tensor, most: int) -> list[tuple[str, np.ndarray]]:
    clips: list[tuple[str, np.ndarray]] = []
    shape = tuple(tensor.shape)
    for name, array in read_archive(path).items():
        if array.shape == shape:
            clips.append((name, array))
        elif array.shape[1:] == shape or (shape[0] == 1 and array.shape[1:] == shape[1:]):
            clips += [(f"{name}[{index}]", item.reshape(shape)) for index, item in enumerate(array)]
        else:
            raise DanceError(f"{path}: {name} has shape {array.shape}, and {tensor.name} takes clips of {shape}")
    if not clips:
        raise DanceError(f"{path} holds no clip")
    return [(name, array.astype(tensor.dtype)) for name, array in clips[:most]]


def _data_set(spec: str, tensor: Tensor, model: str, most: int) -> list[tuple[str, np.ndarray]]:
    from dance_tvm.sparsity.data import load_data

    held_out = load_data(spec, model=model).held_out
    shape = tuple(tensor.shape)
    clips = []
    for index in range(min(most, len(held_out))):
        clip = np.asarray(held_out[index][0])[None]
        if clip.shape != shape:
            raise DanceError(f"{spec} has clips of shape {clip.shape[1:]}, and {tensor.name} takes {shape[1:]}")
        clips.append((f"{spec.split(',')[0]}[{index}]", np.ascontiguousarray(clip.astype(tensor.dtype))))
    return clips
