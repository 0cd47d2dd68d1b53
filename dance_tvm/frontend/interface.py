"""What importing a network gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its name, shape, NumPy dtype, and what it holds in a few words.

    ``range`` is an input's least and greatest value where they are known; of an index, what it may pick from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Imported:
    """A network as one Relax module, whose function ``main`` takes ``inputs`` and returns a tuple of ``outputs``.

    Inference only, weights are constants inside, channels-first as in the source; variables carry the names of the
    source's layers. ``reference`` runs the source itself on arrays by input name; ``source_sha256`` identifies it.
    """

    mod: tvm.IRModule
    name: str
    source_sha256: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    reference: Callable[[Arrays], Arrays]


def usual_meaning(shape: tuple[int, ...], dtype: str) -> str:
    """What an input of this shape and dtype holds in most networks, where nobody said."""
    layouts = {5: "clips (N, C, T, H, W)", 4: "pictures (N, C, H, W)"} if "float" in dtype else {}
    return layouts.get(len(shape), "input of the network")
