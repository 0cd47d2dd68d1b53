"""Engines beside ours, each in a process of its own, asked in turns on one thing that all of them load.

One that is missing or crashes stops nobody else, and one's threads do not wake another's. Outputs are compared with
PyTorch in float64. A turn takes the wall's time and the processor's: where other work shares the machine, the wall's
tells of both, and the processor's (of all threads) of this engine alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    # Every engine's process reads this file: only those that need PyTorch are to load it.
    import torch
    from torch import nn

    from dance_tvm.artifact.folder import Artifact

PEERS = ("ours", "pytorch", "inductor", "onnxruntime", "openvino", "mnn", "mnn-exact")
# LiteRT is not among the peers: its converter from PyTorch pins another PyTorch, and its runtime has no fast Conv3D.

LOAD_SECONDS = 900  # inductor compiles C++, ours compiles the network
RUN_SECONDS = 120
TURN_SECONDS = 0.05  # a turn repeats short runs for so long, so that waking up is a small part of it
WARM_UP_SECONDS = 1.0

Run = Callable[[], Sequence[np.ndarray]]


class Turn(NamedTuple):
    """Seconds of one call, as the mean of a turn's; ``least`` is the processor's time of the shortest one, which other
    work beside it disturbs least."""

    wall: float
    processor: float
    least: float


@dataclass(frozen=True)
class Case:
    """What is measured: files in ``folder`` are model.pt2, model.onnx, input-N.npy and expected-N.npy (float64)."""

    name: str
    macs: int
    folder: Path

    def inputs(self) -> list[np.ndarray]:
        """Its inputs in their order."""
        return _numbered(self.folder, "input")


def _numbered(folder: Path, what: str) -> list[np.ndarray]:
    return [np.load(folder / f"{what}-{index}.npy") for index in range(len(list(folder.glob(f"{what}-*.npy"))))]


# --- engines: each takes a case and a number of threads and returns a function that runs it once ---


def build_ours(case: Case, threads: int) -> Artifact:
    """The case as this compiler builds it for this machine, or as the same compiler built it before."""
    from dance_tvm.artifact.folder import load_artifact
    from dance_tvm.compiler.build import build_network
    from dance_tvm.core.errors import DanceError
    from dance_tvm.core.versions import versions

    model, place = case.folder / "model.pt2", case.folder / f"ours-{threads}"
    built = place / "manifest.json"
    if built.exists() and built.stat().st_mtime > model.stat().st_mtime:
        with suppress(DanceError):  # an artifact of another schema, which is not read
            artifact = load_artifact(place)
            if artifact.manifest.versions.items() >= versions().items():
                return artifact
    return build_network(model, place, target="host", threads=threads, check=False).artifact


def _ours(case: Case, threads: int) -> Run:
    from dance_tvm.device import open_device

    artifact = build_ours(case, threads)
    network = open_device("local").__enter__().load(artifact)
    inputs = {spec.name: value for spec, value in zip(artifact.manifest.inputs, case.inputs(), strict=True)}
    return lambda: list(network.run(inputs).values())


def _program(case: Case, threads: int) -> tuple[nn.Module, list[torch.Tensor]]:
    import torch

    torch.set_num_threads(threads)
    inputs = [torch.from_numpy(value) for value in case.inputs()]
    return torch.export.load(str(case.folder / "model.pt2")).module(), inputs


def _flat(result: Any) -> list[np.ndarray]:
    return [value.numpy() for value in (result if isinstance(result, (tuple, list)) else [result])]


def _pytorch(case: Case, threads: int) -> Run:
    import torch

    module, inputs = _program(case, threads)

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            return _flat(module(*inputs))

    return run


def _inductor(case: Case, threads: int) -> Run:
    import torch

    module, inputs = _program(case, threads)
    compiled = torch.compile(module)

    def run() -> list[np.ndarray]:
        with torch.no_grad():
            return _flat(compiled(*inputs))

    return run


def _onnxruntime(case: Case, threads: int) -> Run:
    from dance_tvm.benchmarking.engines import onnxruntime_session

    session = onnxruntime_session(case.folder / "model.onnx", threads)
    inputs = {spec.name: value for spec, value in zip(session.get_inputs(), case.inputs(), strict=True)}
    return lambda: session.run(None, inputs)


def _openvino(case: Case, threads: int) -> Run:
    from dance_tvm.benchmarking.engines import openvino_request

    request, inputs = openvino_request(case.folder / "model.onnx", threads), case.inputs()
    return lambda: list(request.infer(inputs).values())


def mnn_model(case: Case) -> Path:
    """MNN's own form of ``case``, converted now if it is not there yet. Raises RuntimeError where that fails."""
    model = case.folder / "model.mnn"
    if not model.exists():
        converter = Path(sys.executable).with_name("mnnconvert")
        converted = subprocess.run(
            [converter, "-f", "ONNX", "--modelFile", case.folder / "model.onnx", "--MNNModel", model, "--bizCode", "x"],
            capture_output=True,
            text=True,
            timeout=LOAD_SECONDS,
            check=False,
            env={**os.environ, "PIP_NO_INDEX": "1"},  # it would install a package that reports its use
        )
        if not model.exists():
            said = [line for line in converted.stdout.splitlines() if "rror" in line or "support" in line]
            raise RuntimeError(f"mnnconvert failed: {' '.join(said[-1:])}")
    return model


def _mnn(case: Case, threads: int, exact: bool = False) -> Run:
    import MNN

    interpreter = MNN.Interpreter(str(mnn_model(case)))
    if exact:
        interpreter.setSessionHint(3, 0)  # no Winograd
    session = interpreter.createSession({"numThread": threads, "backend": "CPU", "precision": "high"})
    names = json.loads((case.folder / "names.json").read_text())
    held = interpreter.getSessionInputAll(session)
    for name, x in zip(names["inputs"], case.inputs(), strict=True):
        kind = MNN.Halide_Type_Uint8 if x.dtype == np.uint8 else MNN.Halide_Type_Float
        held[name].copyFrom(MNN.Tensor(x.shape, kind, x, MNN.Tensor_DimensionType_Caffe))
    found = interpreter.getSessionOutputAll(session)

    def run() -> list[np.ndarray]:
        interpreter.runSession(session)
        results = []
        for name in names["outputs"]:
            shape = found[name].getShape()
            array = np.zeros(shape, np.float32)  # the tensor points into it and does not keep it alive
            host = MNN.Tensor(shape, MNN.Halide_Type_Float, array, MNN.Tensor_DimensionType_Caffe)
            found[name].copyToHostTensor(host)
            results.append(np.array(host.getNumpyData()).reshape(shape))
        return results

    return run


ENGINES: dict[str, Callable[[Case, int], Run]] = {
    "ours": _ours,
    "pytorch": _pytorch,
    "inductor": _inductor,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "mnn": _mnn,
    "mnn-exact": lambda case, threads: _mnn(case, threads, exact=True),
}


# --- processes ---


def _serve(peer: str, case: Case, threads: int, pipe: Connection) -> None:
    """In the engine's process: load, warm up, report the error, then run once for every message."""
    try:
        run = ENGINES[peer](case, threads)
        error = _error(case, run())
        begin = time.perf_counter()
        seconds: list[float] = []
        while not seconds or time.perf_counter() - begin < WARM_UP_SECONDS:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        repeats = max(1, round(TURN_SECONDS / min(seconds)))
        pipe.send({"error": error})
        while pipe.recv():
            begin, processor = time.perf_counter(), [time.process_time()]
            for _ in range(repeats):
                run()
                processor.append(time.process_time())
            wall = time.perf_counter() - begin
            least = min(after - before for before, after in pairwise(processor))
            pipe.send(Turn(wall / repeats, (processor[-1] - processor[0]) / repeats, least))
    except EOFError:
        return
    except BaseException as problem:
        told = (str(problem).strip().splitlines() or [""])[0][:200]
        pipe.send({"failed": f"{type(problem).__name__}: {told}"})


def _error(case: Case, outputs: Sequence[np.ndarray]) -> float:
    """The largest difference from float64, as a share of the largest output."""
    expected = _numbered(case.folder, "expected")
    largest = max(float(np.abs(array).max()) for array in expected)
    return max(float(np.abs(a - b.reshape(a.shape)).max()) for a, b in zip(expected, outputs, strict=True)) / largest


class Engine:
    """An engine in its own process."""

    def __init__(self, peer: str, case: Case, threads: int) -> None:
        self.peer = peer
        self.turns: list[Turn] = []
        self.error = float("nan")
        self.failed = ""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Read when the process starts: what OpenMP, MKL and TVM take their number of threads from.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS"):
            os.environ[name] = str(threads)
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["KMP_BLOCKTIME"] = "0"
        self._process = context.Process(target=_serve, args=(peer, case, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()
        answer = self._receive(LOAD_SECONDS)
        if isinstance(answer, dict):
            self.error = answer.get("error", float("nan"))
            self.failed = answer.get("failed", "")
        if self.failed:
            self.close()

    def run(self) -> None:
        """One turn."""
        try:
            self._pipe.send(True)
        except OSError:
            self.failed = "its process died"
            return
        answer = self._receive(RUN_SECONDS)
        if isinstance(answer, Turn):
            self.turns.append(answer)
        else:
            self.failed = (answer or {}).get("failed", "it gave no answer")

    def _receive(self, seconds: float) -> Any:
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
            return {"failed": f"no answer within {seconds:.0f} s"}
        except (EOFError, OSError):
            self._process.join(5)
            return {"failed": f"its process died (exit code {self._process.exitcode})"}

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(5)


def measure(case: Case, peers: Sequence[str], threads: int, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All peers on one case in turns: medians with their intervals, errors, and ratios of ours to each in a round."""
    engines = []
    try:
        for peer in peers:
            say(f"{case.name}, {threads} threads: loading {peer}")
            engines.append(Engine(peer, case, threads))
        able = [engine for engine in engines if not engine.failed]
        shuffle = random.Random(0)
        say(f"{case.name}, {threads} threads: measuring")
        for _ in range(rounds):
            shuffle.shuffle(able)
            for engine in able:
                if not engine.failed:
                    engine.run()
        return summary(case, threads, engines)
    finally:
        for engine in engines:
            engine.close()


def summary(case: Case, threads: int, engines: Sequence[Engine]) -> dict[str, Any]:
    """Figures of engines that ran in turns; intervals are of 95 %."""
    from dance_tvm.benchmarking.statistics import median_interval, paired_ratio

    ours = next((engine for engine in engines if engine.peer == "ours" and not engine.failed), None)
    results: dict[str, Any] = {}
    for engine in engines:
        if engine.failed or not engine.turns:
            results[engine.peer] = {"failed": engine.failed or "not measured"}
            continue
        wall, processor, least = ([turn[at] for turn in engine.turns] for at in range(3))
        median, low, high = median_interval(wall)
        results[engine.peer] = {
            "ms": median * 1e3,
            "interval_ms": [low * 1e3, high * 1e3],
            "processor_ms": float(np.median(processor)) * 1e3,
            "least_processor_ms": min(least) * 1e3,
            "gmacs_per_s": case.macs / median / 1e9,
            "error": engine.error,
            "rounds_ms": [seconds * 1e3 for seconds in wall],
        }
        if ours is not None and len(ours.turns) == len(engine.turns):
            ratio, low, high = paired_ratio([turn.wall for turn in ours.turns], wall)
            results[engine.peer] |= {"ours_over_it": ratio, "ratio_interval": [low, high]}
            own = min(turn.least for turn in ours.turns)
            results[engine.peer]["least_processor_ratio"] = own / min(least)
    return {"case": case.name, "threads": threads, "gmacs": case.macs / 1e9, "peers": results}


# --- cases ---


def export_case(name: str, network: nn.Module, inputs: torch.Tensor | Sequence[torch.Tensor], folder: Path) -> Case:
    """Write the files that the engines read."""
    import onnx
    import torch

    from benchmarks.published.export import reference, write_onnx
    from dance_tvm.models import macs

    inputs = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    place = folder / name.replace("/", "-").replace(" ", "-")
    place.mkdir(parents=True)
    for index, value in enumerate(inputs):
        np.save(place / f"input-{index}.npy", value.numpy())
    program = torch.export.export(network, tuple(inputs), strict=False)
    torch.export.save(program, place / "model.pt2")
    write_onnx(program, network, inputs, place / "model.onnx")
    graph = onnx.load(place / "model.onnx", load_external_data=False).graph
    names = {"inputs": [value.name for value in graph.input], "outputs": [value.name for value in graph.output]}
    (place / "names.json").write_text(json.dumps(names))
    exact, _ = reference(network, inputs)
    for index, array in enumerate(exact):
        np.save(place / f"expected-{index}.npy", array)
    return Case(name, macs.count(network, *inputs), place)
