"""Pictures of what a dynamic network looked at: the clip's frames, dark where a layer computed nothing."""

from __future__ import annotations

import base64
import io
import zlib

import numpy as np

from dance_tvm.benchmarking.results import Alive, Picture

DEAD_BRIGHTNESS = 0.22


def alive_of(layer: Alive) -> np.ndarray:
    """The layer's map (T, H, W) of booleans."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(layer.alive)), np.uint8)
    return np.unpackbits(bits)[: int(np.prod(layer.shape))].reshape(layer.shape).astype(bool)


def shade(picture: Picture, layer: Alive) -> str:
    """The clip's strip of frames as a base64 JPEG, dimmed where the layer computed nothing."""
    from PIL import Image

    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.strip))).convert("RGB"))
    height, width = strip.shape[0], strip.shape[1] // picture.frames
    alive = alive_of(layer)
    frames = np.arange(picture.frames) * alive.shape[0] // picture.frames
    rows = np.arange(height) * alive.shape[1] // height
    columns = np.arange(width) * alive.shape[2] // width
    enlarged = alive[frames][:, rows][:, :, columns]  # (frames, height, width)
    mask = np.concatenate(list(enlarged), axis=1)
    shaded = np.where(mask[..., None], strip[:, : mask.shape[1]], strip[:, : mask.shape[1]] * DEAD_BRIGHTNESS)
    buffer = io.BytesIO()
    Image.fromarray(shaded.astype("uint8")).save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
