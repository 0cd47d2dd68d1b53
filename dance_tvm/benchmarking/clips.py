"""Real input: clips out of a folder of videos, an .npz file, or a data set of `dance-tvm train`."""

from __future__ import annotations

import base64
import io
import warnings
from itertools import islice
from pathlib import Path

import numpy as np

from dance_tvm.artifact.folder import Manifest, Tensor
from dance_tvm.artifact.video_windows import (
    VIDEOS,
    cut_windows,
    doubt_of_scale,
    frames_axis,
    frames_last,
    holds_videos,
    require_video_input,
)
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.input_files import read_archive
from dance_tvm.sparsity.data_names import require_data

MOST_CLIPS = 100
NamedClips = list[tuple[str, dict[str, np.ndarray]]]


def load_clips(spec: str, manifest: Manifest, most: int = MOST_CLIPS) -> NamedClips:
    """Clips by name, each an input of the network. Raises DanceError where the spec or a clip does not fit.

    `spec` is a folder of videos or one video, an .npz file with an array a clip (or one array of many), or what
    `dance-tvm train --data` takes. Warns (DanceWarning) where the scale of videos is a guess.
    """
    require_fitting_clips(spec, manifest)
    tensor, path = manifest.inputs[0], Path(spec)
    if holds_videos(path):
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
    if holds_videos(path):
        _video_files(path)
    elif path.suffix == ".npz":
        read_archive(path)
    else:
        require_data(spec, "--clips")


def require_fitting_clips(spec: str, manifest: Manifest) -> None:
    """Raise DanceError where it is known that the clips, which are there, cannot be the network's input."""
    if len(manifest.inputs) != 1:
        raise DanceError(f"{manifest.name} takes {len(manifest.inputs)} inputs: --clips is for networks with one")
    if holds_videos(Path(spec)):
        require_video_input(manifest)
    elif Path(spec).suffix == ".npz":
        _archive(Path(spec), manifest.inputs[0], 1)


def frames_of(manifest: Manifest) -> int:
    """How many frames of video one run takes: batch times frames of its first five-dimensional input, else batch."""
    for tensor in manifest.inputs:
        if len(tensor.shape) == 5:
            return tensor.shape[0] * tensor.shape[frames_axis(tensor)]
    return manifest.inputs[0].shape[0] if manifest.inputs and manifest.inputs[0].shape else 1


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


def _videos(path: Path, manifest: Manifest, most: int) -> list[tuple[str, np.ndarray]]:
    require_video_input(manifest)
    (tensor,) = manifest.inputs
    windows = (each for file in _video_files(path) for each in cut_windows(file, manifest, None, manifest.preprocess))
    return [(name, arrays[tensor.name]) for name, arrays in islice(windows, most)]


def _video_files(path: Path) -> list[Path]:
    """One video, or those of a folder. Raises DanceError where there is none."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in VIDEOS) if path.is_dir() else [path]
    if not files:
        raise DanceError(f"{path} holds no video ({', '.join(sorted(VIDEOS))})")
    if not files[0].is_file():
        raise DanceError(f"the video {path} is missing; check the path")
    return files


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
