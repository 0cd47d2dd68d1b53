"""Read model files from anywhere without running what may be in them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch

from dance_tvm.core.errors import DanceError
from dance_tvm.models.network_files import is_pickled, not_weights, require_file, require_intact

# What a program in a .pt2 file may call: tensor operators, regions of them, and arithmetic on parts and extents.
_KNOWN_TARGETS = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(float|int|max|min|not|ite)"
)

# How extents that are open are written: symbols, numbers and arithmetic. PyTorch evaluates the text as Python.
_ARITHMETIC = re.compile(
    r"(?:(?:Add|Mul|Pow|Integer|Rational|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CeilToInt|FloorToInt|IntTrueDiv|"
    r"CleanDiv|ToFloat|ModularIndexing)\("
    r"|Symbol\('\w+'|, (?:positive|nonnegative|integer)=(?:True|False)|-?\d+|[(), ])*"
)

# The folders of an archive that PyTorch's loader reads, and what belongs there. Left out are other endings of programs,
# which it reads all the same, and libraries (data/aotinductor), which it would load.
_READ_BY_THE_LOADER = ("models/", "data/")
_KNOWN_MEMBERS = re.compile(
    r"models/[\w.-]+\.json|data/(weights|constants)/([\w.-]+_config\.json|[\w-]+|[\w.-]+\.pt)|data/sample_inputs/[\w.-]+\.pt"
)


def _pickled(path: Path) -> DanceError:
    return DanceError(f"{path} holds pickled objects, which could run code: export the network without them")


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The program in a ``.pt2`` file written by ``torch.export.save``.

    PyTorch's own loader unpickles, evaluates symbolic shapes, resolves any name under ``torch`` and loads libraries, so
    the archive is inspected before it is handed over. Raises DanceError for a file that is torn, foreign, has pickled
    objects or compiled code, shapes that are more than arithmetic, or operators that are not tensor operators.
    """
    require_file(path, "model")
    require_intact(path)
    from torch.export.pt2_archive._package import load_pt2  # with it comes a second of PyTorch's compiler

    try:
        _inspect(path)
        return load_pt2(str(path)).exported_programs["model"]
    except DanceError:
        raise
    except Exception as problem:
        reason = (str(problem).splitlines() or [""])[0][:200]
        if re.search(r"wrap_with_\w+ is missing val field", reason):
            raise DanceError(
                f"{path} holds nested regions (no_grad, autocast), which PyTorch can write but not read: "
                "save program.run_decompositions({}) in place of the program"
            ) from None
        raise DanceError(f"{path} cannot be read as an exported program of this PyTorch: {reason}") from None


def _inspect(path: Path) -> None:
    """Raise DanceError where loading ``path`` would run what stands in it.

    The members are read as the loader will read them, by PyTorch's reader: another one may see another archive.
    """
    from torch.export.pt2_archive import PT2ArchiveReader

    archive = PT2ArchiveReader(str(path))
    members = [name for name in archive.get_file_names() if name.lower().startswith(_READ_BY_THE_LOADER)]
    if len({name.lower() for name in members}) < len(members):
        raise DanceError(f"{path} has two members of the same name: export it again")
    for name in members:
        if not _KNOWN_MEMBERS.fullmatch(name):
            raise DanceError(f"{path} has a member {name}, which is not part of an exported program")
        if name.endswith(".json"):
            _inspect_json(path, _description(path, archive.read_string(name)))
        elif name.endswith(".pt"):
            _require_tensors_alone(path, archive.read_bytes(name))


def _description(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DanceError(f"{path} holds a description that cannot be read: export the network again") from None


def _require_tensors_alone(path: Path, pickled: bytes) -> None:
    """PyTorch's loader reads with ``weights_only`` first and without it where that fails: here it must not fail."""
    if not pickled:
        return
    try:
        torch.load(io.BytesIO(pickled), weights_only=True)
    except Exception:
        raise _pickled(path) from None


def _inspect_json(path: Path, value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _inspect_json(path, item)
    if not isinstance(value, dict):
        return
    if value.get("use_pickle") is True or str(value.get("path_name", "")).startswith(("custom_obj", "opaque_obj")):
        raise _pickled(path)
    expression = value.get("expr_str")
    if "__enum__" in value or not (expression is None or _ARITHMETIC.fullmatch(str(expression))):
        raise DanceError(f"{path} has shapes that cannot be computed: export the network with fixed shapes")
    target = value.get("target")
    if isinstance(target, str) and "inputs" in value and not _KNOWN_TARGETS.fullmatch(target):
        raise DanceError(f"{path} uses the operator {target}, which is not supported")
    for item in value.values():
        _inspect_json(path, item)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a ``.safetensors`` file, or from a state dict read with ``weights_only=True``.

    A checkpoint that wraps its state dict (``state_dict``, ``model_state_dict``, ``model``) is unwrapped. Raises
    DanceError for anything else, pickles full of code included.
    """
    require_file(path, "weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        if is_pickled(path) and ("weights_only" in str(problem) or "Unsupported global" in str(problem)):
            raise DanceError(
                f"{path} holds pickled objects besides tensors, which could run code: save only model.state_dict()"
            ) from None
        raise not_weights(path) from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise DanceError(f"{path} is not a state dict (tensors by name): save only model.state_dict()")
    return loaded
