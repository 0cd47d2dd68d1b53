"""How a program reaches the compiler: as a module, a `.pt2` file, or ONNX from either of PyTorch's exporters."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import dance_tvm
from dance_tvm.frontend.interface import Imported

from .program import Network, Program

_OPSETS = {"dynamo": (18, 18, 19, 20, 21), "script": (11, 12, 13, 14, 15, 16, 17, 18, 19, 20)}
_SIZES = ([1, 2], [1, 3], [2, 5], [1, 7], [4])


class NotExportedError(Exception):
    """PyTorch's exporter does not take the program, which says nothing about the compiler."""


def draw_source(rng: Random) -> dict[str, Any]:
    """Options that say how the program comes in: nothing for a module, as most are."""
    source = rng.choice((None,) * 8 + (".pt2", ".pt2", "dynamo", "dynamo", "script", "script"))
    options: dict[str, Any] = {} if source is None else {"source": source}
    if source in _OPSETS:
        options["opset"] = rng.choice(_OPSETS[source])
    if source and rng.random() < 0.4:
        options["open"] = rng.choice(_SIZES)
    return options


def export(program: Program, network: Network, inputs: Sequence[Tensor], folder: Path) -> Path | nn.Module:
    """The network as its program says: itself, or a file in ``folder``. Raises NotExportedError."""
    source, sizes = program.options.get("source"), program.options.get("open")
    if source is None:
        return network.module
    axis = {0: torch.export.Dim("batch", min=1, max=64)}
    dynamic = tuple(axis if name in _open(network) else {} for name in network.shapes) if sizes else None
    path = folder / ("net.pt2" if source == ".pt2" else "net.onnx")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if source == ".pt2":
                exported = torch.export.export(network.module, tuple(inputs), dynamic_shapes=dynamic)
                torch.export.save(exported, path)
            else:
                _onnx(program, network, inputs, path, dynamic)
    except Exception as error:
        raise NotExportedError(f"{type(error).__name__}: {error}"[:300]) from error
    return path


def _onnx(program: Program, network: Network, inputs: Sequence[Tensor], path: Path, dynamic: Any) -> None:
    names = list(network.shapes)
    words: dict[str, Any] = {"input_names": names, "opset_version": program.options["opset"]}
    if program.options["source"] == "dynamo":
        words |= {"dynamo": True, "external_data": False, "verbose": False, "dynamic_shapes": dynamic}
    else:
        axes = {name: {0: "batch"} for name in _open(network)}
        words |= {"dynamo": False, "dynamic_axes": axes if dynamic else None}
    torch.onnx.export(network.module, tuple(inputs), str(path), **words)


def _open(network: Network) -> list[str]:
    """The inputs whose first axis is the open batch."""
    return [name for name, shape in network.batched(0).items() if shape[:1] == (0,)]


def bring_in(source: Path | nn.Module, network: Network, inputs: Sequence[Tensor], batch: int | None) -> Imported:
    """The network imported, for so many clips where its file leaves that open."""
    if isinstance(source, nn.Module):
        return dance_tvm.import_model(source, example_inputs=tuple(inputs))
    if batch is None:
        return dance_tvm.import_model(source)
    kept = _open(network)
    if source.suffix == ".onnx":  # exporters drop what is never read
        kept = [value.name for value in onnx.load(source).graph.input if value.name in kept]
    shapes = network.batched(batch)
    return dance_tvm.import_model(source, shapes={name: shapes[name] for name in kept})


def onnx_runtime(path: Path, inputs: Sequence[Tensor]) -> list[np.ndarray] | None:
    """What ONNX Runtime makes of the exporter's file; None where it does not run it."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return list(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True))))
    except Exception:
        return None
