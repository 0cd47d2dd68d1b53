"""The tables of RT3D for this compiler, written into docs/rt3d.md: one command each.

    python benchmarks/rt3d.py table1     algorithm x scheme x rate: accuracy on motion digits
    python benchmarks/rt3d.py table2     latency, dense and sparse, against peers
    python benchmarks/rt3d.py table3     vanilla against KGS at equal accuracy

Training runs are kept in --runs and used again when their settings are the same, so a killed command goes on where it
was. Latencies of one table come from one process, in turns, so that their ratios hold on a busy machine.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import nn

from dance_tvm import models, train
from dance_tvm.artifact import Artifact
from dance_tvm.benchmarking.measure import Contender, in_turns
from dance_tvm.compiler import build_network
from dance_tvm.device import KernelTime, LoadedNetwork, open_device
from dance_tvm.errors import DanceError
from dance_tvm.sparsity.checkpoint import read_weights
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate
from dance_tvm.sparsity.training import CARD, MODEL
from dance_tvm.transform.pipeline import Options

app = typer.Typer(add_completion=False, rich_markup_mode=None)
PAGE = Path(__file__).parent.parent / "docs" / "rt3d.md"

DATA = "motion-digits,train=480,test=384,size=24,frames=8"
DENSE_EPOCHS = 12
EPOCHS = 8
# The paper's second rate differs: KGS holds 3.6x on C3D and 3.2x on R(2+1)D.
HIGH_RATE = {"c3d-mini": 3.6, "r2plus1d-mini": 3.2}
ALGORITHMS = ("heuristic", "lasso", "reweighted")


@dataclass(frozen=True)
class Case:
    """One row of Table 1."""

    model: str
    algorithm: str
    scheme: str
    rate: float

    @property
    def folder(self) -> Path:
        return Path(self.model) / f"{self.algorithm}-{self.scheme}-{self.rate:g}"


def table1_cases(model: str) -> list[Case]:
    """The paper's rows: three schemes at 2.6x and KGS at the higher rate, for each algorithm."""
    rows = [("filter", 2.6), ("vanilla", 2.6), ("kgs", 2.6), ("kgs", HIGH_RATE[model])]
    return [Case(model, algorithm, scheme, rate) for algorithm in ALGORITHMS for scheme, rate in rows]


def trained(folder: Path, **settings: Any) -> dict[str, Any]:
    """The card of a training run with these settings, trained now or earlier into ``folder``."""
    card = folder / CARD
    if card.exists():
        found: dict[str, Any] = json.loads(card.read_text())
        if all(found["settings"].get(name) == value for name, value in settings.items() if name != "init"):
            return found
    result = train.run(out=folder, init=settings.pop("init", None), threads=1, **settings)
    return dict(result.card)


def train_dense(runs: Path, model: str) -> dict[str, Any]:
    """The dense network that every pruning run starts from."""
    return trained(runs / model / "dense", method="dense", model=model, data=DATA, epochs=DENSE_EPOCHS, lr=1e-3)


def train_case(runs: Path, case: Case) -> dict[str, Any]:
    """The card of one pruning run; the same epochs and learning rate for all, as in the paper."""
    options = {"algorithm": case.algorithm, "scheme": case.scheme, "rate": case.rate, "dense": 0.0, "retrain": 0.625}
    dense = runs / case.model / "dense" / MODEL
    return trained(
        runs / case.folder, method="kgs", model=case.model, data=DATA, epochs=EPOCHS, batch=16, lr=1e-3, init=dense,
        options=options,
    )  # fmt: skip


@app.callback()
def main() -> None:
    """The tables of docs/rt3d.md."""


@app.command()
def table1(
    runs: Annotated[Path, typer.Option(help="where training runs are kept")] = Path("build/rt3d"),
    model: Annotated[list[str] | None, typer.Option(help="c3d-mini, r2plus1d-mini")] = None,
    algorithm: Annotated[list[str] | None, typer.Option(help="train these only, and leave the page as it is")] = None,
    only_finished: Annotated[bool, typer.Option(help="train nothing: write the rows whose runs are there")] = False,
) -> None:
    """Train every case that is missing and write Table 1."""
    chosen = model or list(HIGH_RATE)
    rows = []
    for name in chosen:
        base = train_dense(runs, name)
        for case in table1_cases(name):
            if algorithm and case.algorithm not in algorithm:
                continue
            if only_finished and not (runs / case.folder / CARD).exists():
                continue
            card = train_case(runs, case)
            print(case, f"{card['metrics']['accuracy']:.1%}", flush=True)
            rows.append(_row(case, card, base))
    if not algorithm:
        header = ["model", "algorithm", "scheme", "MACs after pruning", "rate", "dense accuracy", "accuracy"]
        about = f"Motion digits: {DATA}; {DENSE_EPOCHS} epochs dense, then {EPOCHS} pruning and retraining."
        write_section("table 1", about, header, rows)


def _row(case: Case, card: dict[str, Any], base: dict[str, Any]) -> list[str]:
    pruning = card["pruning"]
    return [
        case.model,
        case.algorithm,
        case.scheme,
        f"{pruning['macs'] / 1e6:.1f} M",
        f"{pruning['rate']:.2f}x",
        f"{base['metrics']['accuracy']:.1%}",
        f"{card['metrics']['accuracy']:.1%}",
    ]


# The paper's Table 2: KGS at these rates.
NETWORKS = {"c3d": 3.6, "r2plus1d-18": 3.2, "s3d": 2.1}
GROUP = (16, 4)


@app.command()
def table2(
    artifacts: Annotated[Path, typer.Option(help="where built networks are kept")] = Path("build/rt3d/artifacts"),
    network: Annotated[list[str] | None, typer.Option(help="c3d, r2plus1d-18, s3d")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    runs: Annotated[int, typer.Option(min=2, help="runs of each network, at least")] = 10,
    group: Annotated[tuple[int, int], typer.Option(help="filters and channels of a kernel group")] = GROUP,
) -> None:
    """Dense, filter, vanilla and KGS latency in one process, with PyTorch's; magnitude pruning, as only time counts."""
    rows = []
    for name in network or list(NETWORKS):
        rate = NETWORKS[name]
        inputs = models.example_inputs(name)
        dense = models.create(name)
        built = {
            "dense": _built(artifacts / f"{name}-dense-{threads}", dense, inputs, threads),
            "dense, direct": _built(artifacts / f"{name}-direct-{threads}", dense, inputs, threads, conv="direct"),
        }
        macs = 0.0
        for scheme in ("filter", "vanilla", "kgs"):
            pruned = models.create(name)
            report = prune_to_rate(pruned, inputs, scheme, rate, *group)  # type: ignore[arg-type]
            macs = report.macs
            built[scheme] = _built(artifacts / f"{name}-{scheme}-{rate:g}-{threads}", pruned, inputs, threads)
        milliseconds = _latencies(built, inputs, models.create(name), threads, runs)
        speed_up = milliseconds["dense, direct"] / milliseconds["kgs"]
        ratios = [f"{speed_up:.2f}x", f"{speed_up / rate:.2f}", f"{milliseconds['kgs'] / milliseconds['vanilla']:.2f}"]
        rows.append(
            [name, f"{macs / 1e9:.1f} G", f"{rate:g}x", *(f"{milliseconds[key]:.0f}" for key in _TIMED), *ratios]
        )
        print(rows[-1], flush=True)
    header = ["network", "MACs", "rate", *(f"{key} (ms)" for key in _TIMED)]
    header += ["KGS over direct", "speed-up / rate", "KGS / vanilla time"]
    about = (
        f"Median of {runs} runs or more in turns, {threads} threads, groups of {group[0]} x {group[1]}, one clip. "
        "Dense is the build as it comes, which takes Winograd's algorithm where that is faster; dense, direct does the "
        "multiply-accumulates that the rate counts."
    )
    write_section("table 2", about, header, rows)


_TIMED = ("PyTorch", "dense", "dense, direct", "filter", "vanilla", "kgs")


class _Eager(LoadedNetwork):
    """PyTorch as it comes, timed like one of ours."""

    def __init__(self, network: nn.Module, threads: int) -> None:
        self._network, self._threads = network.eval(), threads

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            return {"output": self._network(*(torch.from_numpy(array) for array in inputs.values())).numpy()}

    def time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.run(inputs)
            seconds.append(time.perf_counter() - start)
        return seconds

    def kernels(self, inputs: Mapping[str, np.ndarray], repeats: int = 3) -> list[KernelTime]:
        raise DanceError("PyTorch's kernels are not profiled here.")

    def peak_memory(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        return None


def _built(
    folder: Path,
    network: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    threads: int,
    conv: Literal["auto", "direct"] = "auto",
) -> Artifact:
    options = Options(threads=threads, conv=conv)
    return build_network(network, folder, example_inputs=inputs, check=False, options=options).artifact


def _latencies(
    built: Mapping[str, Artifact], inputs: tuple[torch.Tensor, ...], eager: nn.Module, threads: int, runs: int
) -> dict[str, float]:
    """Median milliseconds of each artifact and of PyTorch, measured in turns on this machine."""
    with open_device("local") as session:
        contenders = {}
        for key, artifact in built.items():
            loaded = session.load(artifact)
            names = [tensor.name for tensor in loaded.manifest.inputs]
            feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
            contenders[key] = Contender(loaded, feed)
        contenders["PyTorch"] = Contender(_Eager(eager, threads), feed)
        in_turns(list(contenders.values()), runs, 0.0)
        return {key: 1e3 * float(np.median(contender.seconds)) for key, contender in contenders.items()}


VANILLA_RATES = (1.6, 2.1, 2.6)
KGS_RATES = (2.6, 3.6, 4.6)


@app.command()
def table3(
    runs: Annotated[Path, typer.Option(help="where training runs are kept")] = Path("build/rt3d"),
    model: Annotated[str, typer.Option(help="c3d-mini or r2plus1d-mini")] = "c3d-mini",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    times: Annotated[int, typer.Option(min=2, help="runs of each network, at least")] = 50,
    only_train: Annotated[bool, typer.Option(help="train what is missing and leave the page as it is")] = False,
) -> None:
    """For each vanilla network the fastest KGS one that is at least as accurate, both by the reweighted algorithm."""
    base = train_dense(runs, model)
    cases = [Case(model, "reweighted", "vanilla", rate) for rate in VANILLA_RATES]
    cases += [Case(model, "reweighted", "kgs", rate) for rate in KGS_RATES]
    cards = {case: train_case(runs, case) for case in cases}
    if only_train:
        return
    inputs = (torch.rand(1, *cards[cases[0]]["clip_shape"]),)
    built = {
        str(case.folder): _built(
            runs / "artifacts" / case.folder.name, _network(runs, case, cards[case]), inputs, threads
        )
        for case in cases
    }
    milliseconds = _latencies(built, inputs, _network(runs, cases[0], cards[cases[0]]), threads, times)
    rows = []
    for vanilla in (case for case in cases if case.scheme == "vanilla"):
        as_good = [
            case for case in cases if case.scheme == "kgs" and _accuracy(cards[case]) >= _accuracy(cards[vanilla])
        ]
        for case in (vanilla, *sorted(as_good, key=lambda case: case.rate)[-1:]):
            row = _row(case, cards[case], base)
            rows.append([row[0], row[2], row[5], row[6], row[3], row[4], f"{milliseconds[str(case.folder)]:.2f}"])
    header = ["model", "scheme", "dense accuracy", "accuracy", "MACs after pruning", "rate", "latency (ms)"]
    about = f"Each vanilla network above the KGS network of the highest rate that is as accurate; {threads} threads."
    write_section("table 3", about, header, rows)


def _network(runs: Path, case: Case, card: dict[str, Any]) -> nn.Module:
    network = models.create(case.model, num_classes=len(card["classes"]))
    models.load_state(network, read_weights(runs / case.folder / MODEL))
    return network.eval()


def _accuracy(card: dict[str, Any]) -> float:
    return float(card["metrics"]["accuracy"])


def write_section(
    name: str, about: str, header: Sequence[str], rows: Iterable[Sequence[str]], page: Path = PAGE
) -> None:
    """Replace what stands between the page's ``begin`` and ``end`` comments of section ``name`` by a table.

    Raises DanceError for a page without the section.
    """
    lines = [" | ".join(cells).join(("| ", " |")) for cells in (header, ["---"] * len(header), *rows)]
    body = f"<!-- begin {name} -->\n{about}\n\n" + "\n".join(lines) + f"\n<!-- end {name} -->"
    text = page.read_text()
    pattern = re.compile(f"<!-- begin {name} -->.*?<!-- end {name} -->", re.DOTALL)
    if not pattern.search(text):
        raise DanceError(f"{page} has no section {name!r}: add its begin and end comments.")
    beside = page.with_name(f".{page.name}.{os.getpid()}")
    beside.write_text(pattern.sub(lambda _: body, text))
    os.replace(beside, page)


if __name__ == "__main__":
    app()
