"""Inputs that a user keeps in a file: ``.npz`` with an array by input name, or ``.npy`` with one array."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.random_inputs import Spec

#: Names that a sentence lists.
_MOST_NAMES = 5


def read_inputs(path: Path, specs: Sequence[Spec], network: str) -> dict[str, np.ndarray]:
    """The arrays of ``path`` by the names of ``specs``; a single input may have any name, which is warned of.

    Raises DanceError where the file is no such archive or an array does not fit.
    """
    arrays = read_archive(path)
    wanted = {spec.name: spec for spec in specs}
    if len(wanted) == 1 and len(arrays) == 1:
        if path.suffix == ".npz" and set(wanted) != set(arrays):
            said = f"{path} holds {', '.join(arrays)}, which is taken for {network}'s one input, {', '.join(wanted)}"
            warnings.warn(said, DanceWarning, stacklevel=2)
        arrays = dict(zip(wanted, arrays.values(), strict=True))
    missing, unexpected = sorted(set(wanted) - set(arrays)), sorted(set(arrays) - set(wanted))
    if missing or unexpected:
        problem = " and ".join(
            f"{kind} {', '.join(names[:_MOST_NAMES])}{' …' if names[_MOST_NAMES:] else ''}"
            for kind, names in (("lacks", missing), ("has unknown", unexpected))
            if names
        )
        raise DanceError(f"{path} {problem}: {network} takes {', '.join(wanted)}")
    for name, spec in wanted.items():
        array = arrays[name]
        if array.shape != tuple(spec.shape) or str(array.dtype) != spec.dtype:
            raise DanceError(
                f"{path}: {name} must be {spec.dtype} of shape {tuple(spec.shape)}, "
                f"not {array.dtype} of shape {array.shape}"
                + (f": convert it by .astype('{spec.dtype}')" if array.shape == tuple(spec.shape) else "")
            )
    return {name: arrays[name] for name in wanted}


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` or ``.npy`` file by name. Raises DanceError where it is no such file."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {path.stem: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise DanceError(f"there is no input file {path}") from None
    except OSError as error:
        raise DanceError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise DanceError(f"{path} is not an .npz or .npy file of plain arrays: write it with numpy.savez") from None
