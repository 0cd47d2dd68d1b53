"""From a layer's weights to what its kernel reads: steps that the artifact's library can do when a model is created.

`dance_tvm/artifact/interface/prepare.c` does the same in the same order of operations, so that both give the same bits.
Only numpy is used here.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


class Preparation(ABC):
    """How float32 weights become what a kernel reads. ``kind`` is the C runtime's name for it."""

    kind: str

    @abstractmethod
    def apply(self, weight: np.ndarray) -> np.ndarray:
        """The prepared weights."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """What the C runtime gets, as prepare.c reads it."""

    @property
    def transforms(self) -> tuple[float, ...]:
        """The entries of matrices that the C runtime gets."""
        return ()


@dataclass(frozen=True)
class Panels(Preparation):
    """(groups · group_out, depth, taps) to (panels, taps, depth, lanes), zero beyond a group's last output channel."""

    groups: int
    group_out: int
    depth: int
    taps: int
    lanes: int
    kind = "PANELS"

    def apply(self, weight: np.ndarray) -> np.ndarray:
        per_group = -(-self.group_out // self.lanes)
        padded = np.zeros((self.groups, per_group * self.lanes, self.depth, self.taps), "float32")
        padded[:, : self.group_out] = weight.reshape(self.groups, self.group_out, self.depth, self.taps)
        blocks = padded.reshape(self.groups * per_group, self.lanes, self.depth, self.taps)
        return np.ascontiguousarray(blocks.transpose(0, 3, 2, 1))

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.groups, self.group_out, self.depth, self.taps, self.lanes


@dataclass(frozen=True, eq=False)
class Source:
    """What packed weights were made of: the layer's own weights, and how."""

    preparation: Preparation
    weight: np.ndarray


def array_digest(array: np.ndarray) -> bytes:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
