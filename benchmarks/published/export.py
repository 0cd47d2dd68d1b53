"""Write one network of the table as a .pt2 and an ONNX file, with an input and PyTorch's answers in float64.

    python -m benchmarks.published.export NAME FOLDER

A process of its own, so that the memory and time of PyTorch's exporters are not counted among the compiler's.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from benchmarks.published.networks import NETWORKS
from dance_tvm.core.agreement import difference


class InFloat64(TorchFunctionMode):
    """What a network turns into float32 inside becomes float64 too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args, kwargs = tuple(map(wide, args)), {name: wide(value) for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def _answers(network: nn.Module, inputs: list[torch.Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        results = pytree.tree_leaves(network(*[value.clone() for value in inputs]))
    return [value.numpy() for value in results if isinstance(value, torch.Tensor)]


def reference(network: nn.Module, inputs: list[torch.Tensor]) -> tuple[list[np.ndarray], float]:
    """What the network answers in float64, and how far PyTorch's float32 is off it."""
    in_float32 = _answers(network, inputs)
    exact = copy.deepcopy(network).double()
    with InFloat64():
        wide = [value.double() if value.is_floating_point() else value for value in inputs]
        in_float64 = _answers(exact, wide)
    return in_float64, max(difference(a, b) for a, b in zip(in_float32, in_float64, strict=True))


def export(name: str, folder: Path) -> None:
    """Write ``network.pt2``, ``network.onnx``, ``answers.npz`` and ``facts.json``."""
    entry = next(entry for entry in NETWORKS if entry.name == name)
    network = entry.create()
    inputs = entry.inputs(network)
    folder.mkdir(parents=True, exist_ok=True)
    exact, own = reference(network, inputs)
    named = {f"input_{at}": value.numpy() for at, value in enumerate(inputs)}
    np.savez(folder / "answers.npz", **named, **{f"output_{at}": value for at, value in enumerate(exact)})
    program = torch.export.export(network, tuple(inputs), strict=False)
    torch.export.save(program, folder / "network.pt2")
    facts = {"parameters": sum(value.numel() for value in network.parameters()), "float32_error": own}
    try:
        facts["exporter"] = write_onnx(program, network, inputs, folder / "network.onnx")
    except Exception as problem:
        facts["no_onnx"] = f"PyTorch does not export it: {(str(problem).splitlines() or [type(problem).__name__])[0]}"
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def write_onnx(
    program: torch.export.ExportedProgram, network: nn.Module, inputs: list[torch.Tensor], path: Path
) -> str:
    """Write the file with PyTorch's exporter, or where that cannot with its older one; which it was."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            torch.onnx.export(program, f=path, dynamo=True, verbose=False, external_data=False)
            return "dynamo"
        except Exception:
            torch.onnx.export(network, tuple(inputs), path, dynamo=False, opset_version=17)
            return "TorchScript"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    export(sys.argv[1], Path(sys.argv[2]))
