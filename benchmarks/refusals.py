"""How long a build takes to refuse what it cannot take, for a network of 48 MB: at most 5 s after the imports.

    python -m benchmarks.refusals [--only PATTERN] [--out FILE]

S3D with 4,000 classes (74 convolutions), each time with one thing that no build takes, most of them behind its last
layer, from ``.pt2`` and from ONNX. Each is refused in a process of its own, forked from one that has imported what a
build imports and done nothing else. On a machine that others use the processor's seconds are those to look at.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # noqa: F401  # what an import of an ONNX file loads
import torch
import typer
from onnx import TensorProto, helper
from torch import nn

import dance_tvm.compiler.pipeline
import dance_tvm.frontend.onnx_graph  # noqa: F401  # the same
from benchmarks.runs import machine
from dance_tvm import DanceError, Options, build_network
from dance_tvm.models.networks import create, example_inputs

NETWORK, CLASSES, MOST_SECONDS = "s3d", 4000, 5.0
OUT = Path(__file__).with_name("results") / "refusals.json"

#: What else is told to the build, by kind.
ASKED: dict[str, dict[str, Any]] = {
    "pt2: half precision that the target lacks": {"target": "opencl", "options": Options(dtype="float16")},
    "pt2: a target of no kind known": {"target": "hexagon"},
    "pt2: a shape that does not fit": {"shapes": {"clip": (1, 3, 16, 100, 112)}},
    "pt2: an input that it has not": {"shapes": {"video": (1, 3, 16, 112, 112)}},
    "pt2: a batch that is fixed": {"batch": 4},
    "onnx: weights beside the file": {"weights": "weights.safetensors"},
    "onnx: a shape that does not fit": {"shapes": {"clip": (1, 3, 16, 100, 112)}},
}


class WithTail(nn.Module):
    """The network with something behind its scores."""

    def __init__(self, tail: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.network, self.tail = create(NETWORK, num_classes=CLASSES), tail

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.tail(self.network(clip))


class Counting(nn.Module):
    """A layer that keeps the sum of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.sum()
        return x + self.seen


def _exported(
    tail: Callable[[torch.Tensor], torch.Tensor], train: bool = False, open_batch: bool = False
) -> torch.export.ExportedProgram:
    network, batch = WithTail(tail).train(train), torch.export.Dim("batch", max=64)
    clips = example_inputs(NETWORK, batch=2 if open_batch else 1)
    return torch.export.export(network, clips, strict=False, dynamic_shapes=({0: batch},) if open_batch else None)


def _branches(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))


PROGRAMS: dict[str, Callable[[], Any]] = {
    "pt2: an operator that is not supported": lambda: _exported(lambda x: x.mode(-1)[0]),
    "pt2: an open batch": lambda: _exported(torch.relu, open_batch=True),
    "pt2: training mode": lambda: _exported(torch.relu, train=True),
    "pt2: a buffer that forward changes": lambda: _exported(Counting()),
    "pt2: branches that follow values": lambda: _exported(_branches),
    "pt2: a size that follows values": lambda: _exported(lambda x: torch.nonzero(x)),
    "pt2: complex numbers": lambda: _exported(lambda x: torch.fft.rfft(x).abs()),
    "pt2: random numbers": lambda: _exported(lambda x: x + torch.rand_like(x)),
}


def _save_programs(folder: Path) -> dict[str, Path]:
    plain = folder / "plain.pt2"
    torch.export.save(_exported(torch.relu), plain)
    files = {name: plain for name in ASKED if name.startswith("pt2")}
    for index, (name, program) in enumerate(PROGRAMS.items()):
        files[name] = folder / f"program{index}.pt2"
        torch.export.save(program(), files[name])
    whole = plain.read_bytes()
    files["pt2: a torn file"] = folder / "torn.pt2"
    files["pt2: a torn file"].write_bytes(whole[:-1000])
    files["pt2: a changed byte"] = folder / "changed.pt2"
    middle = len(whole) // 2
    files["pt2: a changed byte"].write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    return files


def _behind(model: Any, nodes: list[Any], outputs: list[str], kind: int = TensorProto.FLOAT) -> Any:
    """The graph with ``nodes`` behind its scores, which they read by the name that these have."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in nodes:
        node.input[:] = [changed.graph.output[0].name if name == "scores" else name for name in node.input]
    changed.graph.node.extend(nodes)
    del changed.graph.output[:]
    changed.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in outputs)
    return changed


def _loop() -> list[Any]:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Neg", ["s"], ["t"]), helper.make_node("Identity", ["on"], ["on2"])],
        "body",
        [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("s", TensorProto.FLOAT, None)],
        [value("on2", TensorProto.BOOL, []), value("t", TensorProto.FLOAT, None)],
    )
    return [
        helper.make_node("ReduceSum", ["scores"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["rounds"], to=TensorProto.INT64),
        helper.make_node("Loop", ["rounds", "", "scores"], ["y"], body=body),
    ]


GRAPHS: dict[str, Callable[[Any], Any]] = {
    "onnx: an operator that is not supported": lambda m: _behind(
        m, [helper.make_node("Det", ["scores"], ["y"])], ["y"]
    ),
    "onnx: an operator of another domain": lambda m: _behind(
        m, [helper.make_node("Fused", ["scores"], ["y"], domain="com.example")], ["y"]
    ),
    "onnx: a loop that follows values": lambda m: _behind(m, _loop(), ["y"]),
    "onnx: a size that follows values": lambda m: _behind(
        m, [helper.make_node("NonZero", ["scores"], ["y"])], ["y"], TensorProto.INT64
    ),
    "onnx: random numbers": lambda m: _behind(m, [helper.make_node("RandomNormalLike", ["scores"], ["y"])], ["y"]),
    "onnx: a sequence": lambda m: _behind(m, [helper.make_node("SequenceConstruct", ["scores"], ["y"])], ["y"]),
    "onnx: an open batch": lambda m: _changed(m, _open_batch),
    "onnx: text as input": lambda m: _changed(m, _text),
    "onnx: an old opset": lambda m: _changed(m, lambda model: setattr(model.opset_import[0], "version", 5)),
    "onnx: an opset to come": lambda m: _changed(m, lambda model: setattr(model.opset_import[0], "version", 99)),
    "onnx: training mode": lambda m: _changed(m, _training),
}


def _changed(model: Any, change: Callable[[Any], None]) -> Any:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    change(copied)
    return copied


def _open_batch(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _text(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("label", TensorProto.STRING, [1]))


def _training(model: Any) -> None:
    (scores,) = model.graph.output
    dropped = helper.make_node("Dropout", [scores.name, "half", "on"], ["y"])
    model.graph.initializer.append(helper.make_tensor("half", TensorProto.FLOAT, [], [0.5]))
    model.graph.initializer.append(helper.make_tensor("on", TensorProto.BOOL, [], [True]))
    model.graph.node.append(dropped)
    scores.name = "y"


def _save_graphs(folder: Path) -> dict[str, Path]:
    plain = folder / "plain.onnx"
    network = create(NETWORK, num_classes=CLASSES).eval()
    torch.onnx.export(
        network, example_inputs(NETWORK), plain, input_names=["clip"], dynamo=True, external_data=False, verbose=False
    )
    model = onnx.load(plain)
    files = {name: plain for name in ASKED if name.startswith("onnx")}
    for index, (name, change) in enumerate(GRAPHS.items()):
        files[name] = folder / f"graph{index}.onnx"
        onnx.save(change(model), files[name])
    files["onnx: a torn file"] = folder / "torn.onnx"
    files["onnx: a torn file"].write_bytes(plain.read_bytes()[:-1000])
    files["onnx: weights that are missing"] = folder / "missing.onnx"
    onnx.save(model, files["onnx: weights that are missing"], save_as_external_data=True, location="missing.bin")
    (folder / "missing.bin").unlink()
    return files


def refuse(name: str, path: Path) -> dict[str, Any]:
    """Seconds by the clock and of the processor until the build refuses, and its sentence."""
    with tempfile.TemporaryDirectory() as folder:
        begin, processor = time.perf_counter(), time.process_time()
        try:
            build_network(path, Path(folder) / "out", **ASKED.get(name, {}))
            told = "built"
        except DanceError as refusal:
            told = str(refusal).replace(str(path.parent), "")
        seconds = {"seconds": time.perf_counter() - begin, "processor_seconds": time.process_time() - processor}
        return {"kind": name, **{key: round(value, 2) for key, value in seconds.items()}, "told": told}


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a fork of this process, which has imported and done nothing, makes of ``arguments``."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def main(only: str = "", out: Path = OUT) -> None:
    """Refuse every kind and write the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        files = {**_apart(_save_programs, Path(folder)), **_apart(_save_graphs, Path(folder))}
        megabytes = (Path(folder) / "plain.onnx").stat().st_size / 1e6
        found = []
        for name, path in files.items():
            if re.search(only, name):
                found.append(_apart(refuse, name, path))
                print("{seconds:6.2f} s ({processor_seconds:.2f})  {kind}: {told}".format(**found[-1]), flush=True)
    late = [row["kind"] for row in found if row["processor_seconds"] > MOST_SECONDS or row["told"] == "built"]
    most = max(row["processor_seconds"] for row in found)
    print(f"{len(found)} kinds, {megabytes:.0f} MB: at most {most:.2f} s of the processor; late or built: {late}")
    result = {"network": NETWORK, "megabytes": round(megabytes), "machine": machine(), "kinds": found}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
