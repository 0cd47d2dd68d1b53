"""What importing a network gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
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
    ``exact``, where there is one, is the source in float64, or None where it cannot be had. ``video`` gives the path of
    a video that was published with the network, fetched on first use; None where there is none.
    """

    mod: tvm.IRModule
    name: str
    source_sha256: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    reference: Callable[[Arrays], Arrays]
    exact: Callable[[Arrays], Sequence[np.ndarray] | None] | None = None
    video: Callable[[], Path] | None = None


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """``array`` as PyTorch's tensor; PyTorch does not know NumPy's bfloat16."""
    array = np.asarray(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(value: torch.Tensor | bool | int | float) -> np.ndarray:
    """A tensor or number as NumPy's array."""
    tensor = torch.as_tensor(value).detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def usual_meaning(shape: tuple[int, ...], dtype: str) -> str:
    """What an input of this shape and dtype holds in most networks, where nothing says so."""
    layouts = {5: "clips (N, C, T, H, W)", 4: "pictures (N, C, H, W)"} if "float" in dtype else {}
    return layouts.get(len(shape), "input of the network")
