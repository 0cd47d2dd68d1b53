"""What importing a network gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import tvm

from dance_tvm.core.errors import DanceError

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


def require_shape(
    declared: Mapping[str, Sequence[int | str]], shapes: Mapping[str, Sequence[int]], batch: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of each input: ``declared``, its open dimensions (names) as ``shapes`` gives them; ``batch``
    is the first dimension of all others, where it is open or has that extent.

    Raises DanceError for an unknown input, for a shape that does not fit, and where an open one is not given.
    """
    unknown = sorted(set(shapes) - set(declared))
    if unknown:
        raise DanceError(f"The network has no input {unknown[0]!r}: it takes {', '.join(declared)}.")
    chosen = {}
    for name, dims in declared.items():
        given = tuple(shapes.get(name, [n for n in _batched(name, dims, batch) if isinstance(n, int)]))
        sizes = ", ".join(map(str, dims))
        if len(given) == len(dims) and all(
            isinstance(n, str) or n == extent for n, extent in zip(dims, given, strict=True)
        ):
            chosen[name] = given
        elif name in shapes:
            raise DanceError(f"Input {name!r} has the shape ({sizes}), which {'x'.join(map(str, given))} does not fit.")
        else:
            example = "x".join(str(n) if isinstance(n, int) else "1" for n in dims)
            raise DanceError(
                f"Input {name!r} has a dynamic shape ({sizes}): fix it with --shape {name}={example} "
                f"(import_model: shapes={{{name!r}: ...}}), one artifact for each shape."
            )
    return chosen


def _batched(name: str, dims: Sequence[int | str], batch: int | None) -> Sequence[int | str]:
    """The dimensions with ``batch`` as the first. Raises DanceError where another is fixed."""
    if batch is None or not dims:
        return dims
    if isinstance(dims[0], int) and dims[0] != batch:
        raise DanceError(
            f"Input {name!r} is fixed to a batch of {dims[0]}: export the network with an open batch "
            f"(`dance-tvm export --open-batch`), or leave --batch {batch} out."
        )
    return [batch, *dims[1:]]


def usual_meaning(shape: tuple[int, ...], dtype: str) -> str:
    """What an input of this shape and dtype holds in most networks, where nobody said."""
    layouts = {5: "clips (N, C, T, H, W)", 4: "pictures (N, C, H, W)"} if "float" in dtype else {}
    return layouts.get(len(shape), "input of the network")
