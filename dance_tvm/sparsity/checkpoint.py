"""Checkpoints that survive a kill: one safetensors file, its JSON in the header, written beside and renamed.

Tensors and JSON share one file so that no kill can leave one without the other. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.trained import HEADER_KEY, read_card


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path`, syncs and renames, so that a reader sees the old file or the new one, never a part.

    Raises DanceError when the disk refuses; the file that was there stays as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        kept = f"; the last good {path.name} is intact" if path.exists() else ""
        raise DanceError(
            f"could not write {path}: {error.strerror or error}; free some space and resume{kept}"
        ) from error


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes `tensors` and the JSON-serialisable `about` into one safetensors file, atomically."""
    owned = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(owned, metadata={HEADER_KEY: json.dumps(about, sort_keys=True)}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_checkpoint` wrote: (tensors, about).

    Raises DanceError when the file is missing, torn, or was not written by this package.
    """
    card = read_card(path)
    try:
        return load_file(path), card
    except (SafetensorError, OSError, struct.error) as error:
        raise DanceError(f"{path} is not a readable checkpoint ({error}); train anew or name another file") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The network's own weights from a checkpoint, any plain safetensors file, or a state dict of PyTorch's."""
    if not path.is_file():
        raise DanceError(f"the weights file {path} is missing; name an existing .safetensors, .pt or .pth file")
    if path.suffix in (".pt", ".pth"):
        return _state_dict(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DanceError(
            f"{path} is not a safetensors file ({error}); convert the weights to safetensors first"
        ) from error
    ours = {name.removeprefix("network/"): tensor for name, tensor in tensors.items() if name.startswith("network/")}
    return ours or tensors


def _state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict, unwrapped; nothing in the file is run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DanceError(
            f"{path} holds no plain state dict ({type(error).__name__}); save model.state_dict()"
        ) from error
    for wrapper in ("state_dict", "model_state_dict", "model_state", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DanceError(f"{path} is not a state dict (tensors by name); save model.state_dict()")
    return found


def fitting(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without the last layer's where it has another number of classes, as a pretrained network's has."""
    own = network.state_dict()
    wrong = [name for name, tensor in weights.items() if name in own and own[name].shape != tensor.shape]
    last = list(own)[-1].rpartition(".")[0]
    if not all(name.rpartition(".")[0] == last and own[name].shape[1:] == weights[name].shape[1:] for name in wrong):
        return dict(weights)
    return {name: tensor for name, tensor in weights.items() if name not in wrong}


def matched(network: nn.Module, weights: Mapping[str, Tensor], origin: str) -> str:
    """In one sentence, how much of the network the weights fill, and by name what they leave."""
    own = network.state_dict()
    taken = [name for name in own if name in weights and weights[name].shape == own[name].shape]
    parts = [
        ("left as they were made", [name for name in own if name not in weights]),
        ("of another shape, and not taken", [name for name in own if name in weights and name not in taken]),
        ("of no use here", [name for name in weights if name not in own]),
    ]
    rest = "".join(f"; {what}: {_some(names)}" for what, names in parts if names)
    return f"{origin} gives {len(taken)} of {len(own)} tensors{rest}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def load_weights(
    network: nn.Module, weights: Mapping[str, Tensor], origin: Path | str, *, partial: bool = False
) -> list[str]:
    """Loads `weights` into `network`, or says in one sentence why they belong to another one.

    With `partial`, names that only one side has are left alone (a method added or dropped its own parameters), but
    at least half of the network's tensors must be found. Returns the names of the network that were left alone.
    """
    own = network.state_dict()
    wrong = [name for name, tensor in weights.items() if name in own and own[name].shape != tensor.shape]
    if wrong:
        name = wrong[0]
        raise DanceError(
            f"{origin} belongs to another network: {name} has shape {tuple(weights[name].shape)} there and "
            f"{tuple(own[name].shape)} here; choose the same --model, --data and method options"
        )
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    if partial and 2 * len(missing) < len(own):
        unknown = []
    elif missing or unknown:
        example = (missing or unknown)[0]
        raise DanceError(
            f"{origin} belongs to another network: {len(missing)} tensors are missing and {len(unknown)} unknown "
            f"(for example {example}); choose the same --model and --method"
        )
    network.load_state_dict({name: weights.get(name, own[name]) for name in own})
    return missing


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as named tensors: `<parameter index>/<entry>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{entry}": value if isinstance(value, Tensor) else torch.tensor(float(value))
        for index, entries in state.items()
        for entry, value in entries.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave; parameter groups keep the settings they were made with."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, entry = name.split("/", 1)
        state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named `prefix/name`, so that several parts fit in one file."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part that `with_prefix` named so, by its own names."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}
