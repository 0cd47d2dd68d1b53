"""Ours against PyTorch, inductor, ONNX Runtime, OpenVINO and MNN: fp32, batch 1, whole networks and single layers.

    python benchmarks/peers.py                        networks on 1 and 2 threads
    python benchmarks/peers.py --layers               the layers of C3D and R(2+1)D-18 singly
    python benchmarks/peers.py --quick                two small networks, in about a minute
    python benchmarks/peers.py --only c3d --peers ours,openvino --threads 2

Every engine lives in its own process, so that one that is missing or crashes stops nobody else, and one's threads do
not wake another's. The processes are asked in turns, each round in another order, one at a time: noise hits all alike,
and ratios are taken within a round. Outputs are compared with PyTorch in float64.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from dance_tvm.core.errors import DanceError

if TYPE_CHECKING:
    # Every engine's process reads this file: only those that need PyTorch are to load it.
    import torch
    from torch import nn

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PEERS = ("ours", "pytorch", "inductor", "onnxruntime", "openvino", "mnn", "mnn-exact")
NETWORKS = ("c3d", "r2plus1d-18", "s3d", "transnetv2")
QUICK_NETWORKS = ("c3d-mini", "r2plus1d-mini")
LAYERED = ("c3d", "r2plus1d-18")
# LiteRT is not among the peers: its converter from PyTorch pins another PyTorch, and its runtime has no fast Conv3D.

LOAD_SECONDS = 900  # inductor compiles C++, ours compiles the network
RUN_SECONDS = 120
TURN_SECONDS = 0.05  # a turn repeats short runs for so long, so that waking up is a small part of it
WARM_UP_SECONDS = 1.0

Run = Callable[[], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Case:
    """What is measured: files in ``folder`` are model.pt2, model.onnx, input.npy and expected-N.npy (float64)."""

    name: str
    macs: int
    folder: Path


# --- engines: each takes a case and a number of threads and returns a function that runs it once ---


def _input(case: Case) -> np.ndarray:
    return np.load(case.folder / "input.npy")


def _ours(case: Case, threads: int) -> Run:
    from dance_tvm.compiler.build import build_network
    from dance_tvm.device import open_device

    built = build_network(
        case.folder / "model.pt2", case.folder / f"ours-{threads}", target="host", threads=threads, check=False
    )
    device = open_device("local").__enter__()
    network = device.load(built.artifact)
    inputs = {built.artifact.manifest.inputs[0].name: _input(case)}
    return lambda: list(network.run(inputs).values())


def _program(case: Case, threads: int) -> tuple[nn.Module, torch.Tensor]:
    import torch

    torch.set_num_threads(threads)
    return torch.export.load(str(case.folder / "model.pt2")).module(), torch.from_numpy(_input(case))


def _flat(result: Any) -> list[np.ndarray]:
    return [value.numpy() for value in (result if isinstance(result, (tuple, list)) else [result])]


def _pytorch(case: Case, threads: int) -> Run:
    import torch

    module, x = _program(case, threads)

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            return _flat(module(x))

    return run


def _inductor(case: Case, threads: int) -> Run:
    import torch

    module, x = _program(case, threads)
    compiled = torch.compile(module)

    def run() -> list[np.ndarray]:
        with torch.no_grad():
            return _flat(compiled(x))

    return run


def _onnxruntime(case: Case, threads: int) -> Run:
    from dance_tvm.benchmarking.engines import onnxruntime_session

    session = onnxruntime_session(case.folder / "model.onnx", threads)
    inputs = {session.get_inputs()[0].name: _input(case)}
    return lambda: session.run(None, inputs)


def _openvino(case: Case, threads: int) -> Run:
    from dance_tvm.benchmarking.engines import openvino_request

    request, x = openvino_request(case.folder / "model.onnx", threads), _input(case)
    return lambda: list(request.infer([x]).values())


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
    x, target = _input(case), interpreter.getSessionInput(session)
    kind = MNN.Halide_Type_Uint8 if x.dtype == np.uint8 else MNN.Halide_Type_Float
    target.copyFrom(MNN.Tensor(x.shape, kind, x, MNN.Tensor_DimensionType_Caffe))
    found = interpreter.getSessionOutputAll(session)
    names = json.loads((case.folder / "outputs.json").read_text())

    def run() -> list[np.ndarray]:
        interpreter.runSession(session)
        results = []
        for name in names:
            shape = found[name].getShape()
            array = np.zeros(shape, np.float32)  # the tensor points into it and does not keep it alive
            host = MNN.Tensor(shape, MNN.Halide_Type_Float, array, MNN.Tensor_DimensionType_Caffe)
            found[name].copyToHostTensor(host)
            results.append(np.array(host.getNumpyData()).reshape(shape))
        return results

    return run


_ENGINES: dict[str, Callable[[Case, int], Run]] = {
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
        run = _ENGINES[peer](case, threads)
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
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            pipe.send((time.perf_counter() - start) / repeats)
    except EOFError:
        return
    except BaseException as problem:
        told = (str(problem).strip().splitlines() or [""])[0][:200]
        pipe.send({"failed": f"{type(problem).__name__}: {told}"})


def _error(case: Case, outputs: Sequence[np.ndarray]) -> float:
    """The largest difference from float64, as a share of the largest output."""
    expected = [np.load(path) for path in sorted(case.folder.glob("expected-*.npy"))]
    largest = max(float(np.abs(array).max()) for array in expected)
    return max(float(np.abs(a - b.reshape(a.shape)).max()) for a, b in zip(expected, outputs, strict=True)) / largest


class Engine:
    """An engine in its own process."""

    def __init__(self, peer: str, case: Case, threads: int) -> None:
        self.peer = peer
        self.seconds: list[float] = []
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
        if isinstance(answer, float):
            self.seconds.append(answer)
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
    """All peers on one case in turns: medians, spread, errors, and ratios of ours to each within a round."""
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
        return _summary(case, threads, engines)
    finally:
        for engine in engines:
            engine.close()


def _summary(case: Case, threads: int, engines: Sequence[Engine]) -> dict[str, Any]:
    ours = next((engine for engine in engines if engine.peer == "ours" and not engine.failed), None)
    results: dict[str, Any] = {}
    for engine in engines:
        if engine.failed or not engine.seconds:
            results[engine.peer] = {"failed": engine.failed or "not measured"}
            continue
        low, median, high = (float(q) for q in np.percentile(engine.seconds, [25, 50, 75]))
        results[engine.peer] = {
            "ms": median * 1e3,
            "quartiles_ms": [low * 1e3, high * 1e3],
            "gmacs_per_s": case.macs / median / 1e9,
            "error": engine.error,
            "rounds_ms": [seconds * 1e3 for seconds in engine.seconds],
        }
        if ours is not None and len(ours.seconds) == len(engine.seconds):
            results[engine.peer]["ours_over_it"] = float(np.median(np.array(ours.seconds) / np.array(engine.seconds)))
    return {"case": case.name, "threads": threads, "gmacs": case.macs / 1e9, "peers": results}


# --- cases ---


def networks(names: Sequence[str], folder: Path) -> Iterator[Case]:
    """Whole networks, published weights where they can be had, else seeded ones."""
    from dance_tvm import models

    for name in names:
        network = models.create(name)
        if models.entry(name).pretrained:
            try:
                network = models.pretrained(name)
            except DanceError as problem:
                print(f"{name}: random weights ({problem})", file=sys.stderr)
        yield export_case(name, network, models.example_inputs(name)[0], folder)


def layers(name: str, folder: Path) -> Iterator[Case]:
    """The convolutions of a network singly, each distinct shape once, with the input that reaches it."""
    import torch
    from torch import nn

    from dance_tvm import models

    network, seen = models.create(name), set()
    reached: list[tuple[str, nn.Module, torch.Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, x, _y, at=path: reached.append((at, m, x[0])))
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv3d)
    ]
    with torch.inference_mode():
        network(*models.example_inputs(name))
    for hook in hooks:
        hook.remove()
    for path, module, x in reached:
        assert isinstance(module, nn.Conv3d)
        key = (tuple(x.shape), tuple(module.weight.shape), module.stride, module.padding)
        if key not in seen:
            seen.add(key)
            # The convolution alone: MNN's converter loses one whose activation is the output of the whole graph.
            yield export_case(f"{name}/{path}", nn.Sequential(module).eval(), x.clone(), folder)


def export_case(name: str, network: nn.Module, x: torch.Tensor, folder: Path) -> Case:
    """Write the files that the engines read."""
    import torch

    from dance_tvm.models import macs

    place = folder / name.replace("/", "-")
    place.mkdir(parents=True)
    np.save(place / "input.npy", x.numpy())
    torch.export.save(torch.export.export(network, (x,)), place / "model.pt2")
    onnx = torch.onnx.export(network, (x,), dynamo=True, verbose=False, external_data=False)
    if onnx is None:
        raise DanceError(f"{name} cannot be exported to ONNX.")
    onnx.save(str(place / "model.onnx"))
    outputs = [value.name for value in onnx.model.graph.outputs]
    (place / "outputs.json").write_text(json.dumps(outputs))
    count = macs.count(network, x)
    with torch.inference_mode():
        doubled = network.double()(x.double() if x.is_floating_point() else x)
    for index, array in enumerate(_flat(doubled)):
        np.save(place / f"expected-{index}.npy", array)
    return Case(name, count, place)


# --- the command ---


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    def found(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("apache-tvm", "torch", "onnxruntime", "openvino", "MNN")
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {package: found(package) for package in packages},
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Medians in ms, spread, and errors, one line for each case and peer."""
    lines = []
    for run in runs:
        lines.append(f"{run['case']}, {run['threads']} threads, {run['gmacs']:.2f} GMAC")
        timed = [result["ms"] for result in run["peers"].values() if "ms" in result]
        for peer, result in run["peers"].items():
            if "ms" not in result:
                lines.append(f"    {peer:<12} {result['failed']}")
                continue
            low, high = result["quartiles_ms"]
            against = f"  ours takes {result['ours_over_it']:.2f} of it" if "ours_over_it" in result else ""
            spread = f"{result['ms']:9.2f} ms ({low:.2f} to {high:.2f})  {result['gmacs_per_s']:6.1f} GMAC/s"
            slower = f"{result['ms'] / min(timed):5.2f} x fastest  error {result['error']:.1e}"
            lines.append(f"    {peer:<12} {spread}  {slower}{against}")
    return "\n".join(lines)


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Two small networks, few rounds.")] = False,
    layers_too: Annotated[bool, typer.Option("--layers", help="Layers singly in place of whole networks.")] = False,
    only: Annotated[str, typer.Option(help="Comma-separated networks of the zoo; of layers a part of the name.")] = "",
    peers: Annotated[str, typer.Option(help="Comma-separated peers.")] = ",".join(PEERS),
    threads: Annotated[str, typer.Option(help="Comma-separated numbers of threads.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each peer.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder for peers.json.")] = Path("benchmarks/results"),
) -> None:
    """Measure, print a table, and write JSON (`benchmarks.plots` draws it)."""
    chosen = [peer for peer in peers.split(",") if peer]
    if unknown := [peer for peer in chosen if peer not in _ENGINES]:
        print(f"error: unknown peer {unknown[0]}: choose among {', '.join(PEERS)}", file=sys.stderr)
        raise typer.Exit(2)
    rounds = min(rounds, 5) if quick else rounds
    runs = []
    name = "peers-quick" if quick else "peers-layers" if layers_too else "peers"
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        for case in _cases(quick, layers_too, only, Path(scratch)):
            for count in (int(number) for number in threads.split(",")):
                runs.append(measure(case, chosen, count, rounds, lambda text: print(text, file=sys.stderr)))
                print(table(runs[-1:]), flush=True)
                write_runs(runs, out / f"{name}.json")
    if not runs:
        print(f"error: no case is called {only!r}", file=sys.stderr)
        raise typer.Exit(2)
    print(f"written: {out / name}.json")


def write_runs(runs: list[dict[str, Any]], path: Path) -> None:
    """Write what has been measured so far; figures of other cases that the file holds are kept."""
    done = {(run["case"], run["threads"]) for run in runs}
    before = json.loads(path.read_text())["runs"] if path.exists() else []
    every = [run for run in before if (run["case"], run["threads"]) not in done] + runs
    result = {"machine": machine(), "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "runs": every}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, path)


def _cases(quick: bool, layers_too: bool, only: str, folder: Path) -> Iterator[Case]:
    """The chosen cases, prepared one at a time: the networks' files together take gigabytes."""
    wanted = [part for part in only.split(",") if part]

    def chosen(name: str) -> bool:
        return not wanted or any(part in name for part in wanted)

    if layers_too:
        for name in LAYERED:
            if not wanted or any(part.startswith(name) or part in name or "/" not in part for part in wanted):
                yield from (case for case in layers(name, folder) if chosen(case.name))
        return
    from dance_tvm import models

    asked = [name for name in wanted if name in models.names()]
    yield from networks(asked if wanted else QUICK_NETWORKS if quick else NETWORKS, folder)


if __name__ == "__main__":
    app()
