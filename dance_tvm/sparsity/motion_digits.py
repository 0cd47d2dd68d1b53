"""Handwritten digits that move: clips that are there without a download."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.clips import Splits

MOTIONS = ("still", "slide", "bounce", "rotate left", "rotate right", "pulse", "orbit", "blink")


class MotionDigits:
    """Real handwritten digits (scikit-learn's 8x8 scans) that move; the label says how. Values 0 to 1.

    Clips differ in difficulty on purpose, so that a network that decides per clip has something to decide: `difficulty`
    (0 to 1, drawn evenly) shrinks the digit and its contrast, shortens the motion to a part of the clip, and adds
    noise and up to three digits that stand still. A clip is settled by (seed, held-out or not, its index) alone, and
    the two splits use different handwritten digits.
    """

    classes: tuple[str, ...] = MOTIONS

    def __init__(self, count: int, *, size: int = 32, frames: int = 16, seed: int = 0, held_out: bool = False) -> None:
        if size < 24 or frames < 8 or count < 1:
            raise DanceError(
                f"motion digits need size >= 24, frames >= 8 and a clip or more, not {size}, {frames}, {count}"
            )
        self.shape: tuple[int, int, int, int] = (1, frames, size, size)
        self._count, self._seed, self._held_out = count, seed, held_out
        digits = _handwritten_digits()
        self._digits = digits[-len(digits) // 5 :] if held_out else digits[: -len(digits) // 5]
        self._rendered: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._count

    def label(self, index: int) -> int:
        return index % len(MOTIONS)

    def difficulty(self, index: int) -> float:
        """0 (a large bright digit on black that moves all the time) to 1 (small, dim, noisy, briefly, in company)."""
        return float(self._random(index).uniform())

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        if index not in self._rendered:
            self._rendered[index] = self._render(index)
        return torch.from_numpy(self._rendered[index]).float() / 255, self.label(index)

    def _random(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, int(self._held_out), index])

    def _render(self, index: int) -> np.ndarray:
        random = self._random(index)
        difficulty = float(random.uniform())
        _, frames, size, _ = self.shape
        start, stop = _moving_frames(random, frames, difficulty)
        paths = _paths(MOTIONS[self.label(index)], random, frames, start, stop, difficulty)
        contrast = 1 - 0.8 * difficulty * random.uniform(0.5, 1)
        clip = contrast * _draw(self._pick(random), size, paths)
        for _ in range(round(3 * difficulty * random.uniform())):
            bystander = _still_path(random, frames, scale=random.uniform(0.22, 0.36))
            clip = np.maximum(clip, contrast * random.uniform(0.5, 1.2) * _draw(self._pick(random), size, bystander))
        clip += random.normal(0, 0.16 * difficulty * random.uniform(0.3, 1), clip.shape)
        return np.asarray(255 * clip.clip(0, 1), np.uint8)[None]

    def _pick(self, random: np.random.Generator) -> np.ndarray:
        return self._digits[random.integers(len(self._digits))]


@lru_cache(maxsize=1)
def _handwritten_digits() -> np.ndarray:
    """scikit-learn's 1,797 scans as (count, 8, 8) float32, 0 to 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DanceError("motion digits need scikit-learn; install it with: pip install 'dance-tvm[train]'") from error
    return np.asarray(load_digits().images, np.float32) / 16


class _Paths(NamedTuple):
    """One digit's pose in each frame (T,): centre x and y (-1 to 1), half-width, angle in radians, brightness."""

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    angle: np.ndarray
    light: np.ndarray


def _moving_frames(random: np.random.Generator, frames: int, difficulty: float) -> tuple[int, int]:
    """First frame of the motion and the one after its last: a hard clip rests for up to two thirds of its frames."""
    length = max(frames // 3, round(frames * (1 - 0.67 * difficulty * random.uniform(0.3, 1))))
    start = int(random.integers(frames - length + 1))
    return start, start + length


def _still_path(random: np.random.Generator, frames: int, scale: float) -> _Paths:
    room = 1 - scale
    x, y = random.uniform(-room, room, 2)
    full = np.ones(frames)
    return _Paths(x * full, y * full, scale * full, random.uniform(-0.2, 0.2) * full, full)


def _paths(motion: str, random: np.random.Generator, frames: int, start: int, stop: int, difficulty: float) -> _Paths:
    """The moving digit's pose in each frame; outside [start, stop) it rests."""
    scale = 0.5 - 0.26 * difficulty * random.uniform(0.5, 1)
    pose = _still_path(random, frames, scale)
    phase = np.clip((np.arange(frames) - start) / max(1, stop - 1 - start), 0, 1)
    room = (1 - scale) * (1 - 0.5 * difficulty * random.uniform())  # how far a hard clip's digit goes
    direction = random.uniform(0, 2 * math.pi)
    match motion:
        case "slide":
            reach = room * np.array([math.cos(direction), math.sin(direction)])
            return pose._replace(x=reach[0] * (2 * phase - 1), y=reach[1] * (2 * phase - 1))
        case "bounce":
            hops = random.integers(2, 4)
            height = np.abs(np.sin(math.pi * hops * phase))
            return pose._replace(y=room - 2 * room * random.uniform(0.6, 1) * height)
        case "rotate left" | "rotate right":
            turn = (random.uniform(0.75, 1.5) - 0.5 * difficulty) * 2 * math.pi * phase
            return pose._replace(angle=pose.angle + (turn if motion == "rotate left" else -turn))
        case "pulse":
            beats = random.integers(1, 3)
            return pose._replace(scale=scale * (1 - random.uniform(0.4, 0.6) * np.sin(math.pi * beats * phase) ** 2))
        case "orbit":
            turn = direction + random.choice([-1, 1]) * 2 * math.pi * phase
            radius = room * random.uniform(0.7, 1)
            return pose._replace(x=radius * np.cos(turn), y=radius * np.sin(turn))
        case "blink":
            blinks = random.integers(2, 4)
            return pose._replace(light=np.where(np.sin(2 * math.pi * blinks * phase) < -0.2, 0.0, 1.0))
        case _:
            return pose


def _draw(digit: np.ndarray, size: int, pose: _Paths) -> np.ndarray:
    """The digit drawn in every frame, (T, size, size)."""
    cos, sin, inverse = np.cos(pose.angle), np.sin(pose.angle), 1 / pose.scale
    rows = np.stack([
        np.stack([cos * inverse, sin * inverse, -(cos * pose.x + sin * pose.y) * inverse], -1),
        np.stack([-sin * inverse, cos * inverse, (sin * pose.x - cos * pose.y) * inverse], -1),
    ], 1)  # fmt: skip
    frames = len(pose.x)
    grid = functional.affine_grid(torch.from_numpy(rows).float(), [frames, 1, size, size], align_corners=False)
    image = torch.from_numpy(digit).expand(frames, 1, 8, 8)
    drawn = functional.grid_sample(image, grid, align_corners=False)[:, 0].numpy()
    return np.asarray(drawn * pose.light[:, None, None])


def motion_digits(
    path: str, model: str, seed: int, train: int = 4096, test: int = 1024, size: int = 32, frames: int = 16
) -> Splits:
    """The two splits, as ``--data motion-digits`` names them."""
    if path:
        raise DanceError(f"motion-digits takes no path, and {path!r} was given")
    return Splits(
        "motion-digits",
        MotionDigits(train, size=size, frames=frames, seed=seed),
        MotionDigits(test, size=size, frames=frames, seed=seed, held_out=True),
    )
