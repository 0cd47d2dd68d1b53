"""The tables of RT3D for this compiler, written into docs/rt3d.md: one command each.

    python -m benchmarks.rt3d table1     algorithm x scheme x rate: accuracy on motion digits, agreement of TransNetV2
    python -m benchmarks.rt3d build      compile what table2 times
    python -m benchmarks.rt3d table2     latency, dense and sparse, against peers
    python -m benchmarks.rt3d table3     vanilla against KGS at equal accuracy
    python -m benchmarks.rt3d layer      one layer at many rates: where skipping begins to pay, and at which rates
    python -m benchmarks.rt3d combined   kernel groups together with masks that leave half the work
    python -m benchmarks.rt3d instructions   what the emulated phone executes, dense and pruned

Training runs are kept in --runs and used again when their settings are the same, so a killed command goes on where it
was. Latencies of one table come from one process, in turns, so that their ratios hold on a busy machine.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import nn

from dance_tvm import models, train
from dance_tvm.artifact.folder import Artifact, load_artifact
from dance_tvm.benchmarking.measure import Contender, in_turns
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.errors import DanceError
from dance_tvm.device import KernelTime, LoadedNetwork, open_device
from dance_tvm.models.macs import count as count_macs
from dance_tvm.records.group_choice import SynthesisedLayer
from dance_tvm.sparsity.checkpoint import load_weights, read_weights, write_atomically
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate
from dance_tvm.sparsity.tasks import Logits
from dance_tvm.sparsity.training import CARD, MODEL
from dance_tvm.tuning.measure_groups import one_convolution

from .agreement import Agreement, Judge
from .engines import Case as PeerCase
from .engines import Engine, export_case

app = typer.Typer(add_completion=False, rich_markup_mode=None)
RESULTS = Path(__file__).parent / "results" / "rt3d.json"
PAGE = Path(__file__).parent.parent / "docs" / "rt3d.md"


@dataclass(frozen=True)
class Subject:
    """A network of Table 1: its clips and epochs, the rate of its rows and that of a second KGS row.

    The paper's second rate differs: KGS holds 3.6x on C3D and 3.2x on R(2+1)D. ``dense_epochs`` 0: published weights.
    """

    data: str
    high_rate: float | None
    dense_epochs: int
    epochs: int = 8
    batch: int = 16
    lr: float = 1e-3
    rate: float = 2.6


_WINDOWS = "transnet:published,window=50"
SUBJECTS = {
    "c3d-mini": Subject("motion-digits,train=480,test=384,size=24,frames=8", 3.6, 12),
    "r2plus1d-mini": Subject("motion-digits,train=1536,test=1024,size=24,frames=8", 3.2, 8, epochs=5),
    "transnetv2": Subject(f"{_WINDOWS},most=6", None, 0, batch=1, lr=1e-4, rate=1.3),
}
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
    """The paper's rows: three schemes at one rate and KGS at a higher one, for each algorithm."""
    rate, high = SUBJECTS[model].rate, SUBJECTS[model].high_rate
    rows = [("filter", rate), ("vanilla", rate), ("kgs", rate), *([("kgs", high)] if high else [])]
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
    subject = SUBJECTS[model]
    return trained(
        runs / model / "dense", method="dense", model=model, data=subject.data, epochs=subject.dense_epochs, lr=1e-3
    )


def train_case(runs: Path, case: Case) -> dict[str, Any]:
    """The card of one pruning run; the same epochs and learning rate for all, as in the paper."""
    options = {"algorithm": case.algorithm, "scheme": case.scheme, "rate": case.rate, "dense": 0.0, "retrain": 0.625}
    subject = SUBJECTS[case.model]
    dense = runs / case.model / "dense" / MODEL if subject.dense_epochs else None
    return trained(
        runs / case.folder, method="kgs", model=case.model, data=subject.data, epochs=subject.epochs,
        batch=subject.batch, lr=subject.lr, init=dense, options=options,
    )  # fmt: skip


@app.callback()
def main() -> None:
    """The tables of docs/rt3d.md."""


@app.command()
def table1(
    runs: Annotated[Path, typer.Option(help="where training runs are kept")] = Path("build/rt3d"),
    model: Annotated[list[str] | None, typer.Option(help="c3d-mini, r2plus1d-mini, transnetv2")] = None,
    algorithm: Annotated[list[str] | None, typer.Option(help="train these only, and leave the page as it is")] = None,
    only_finished: Annotated[bool, typer.Option(help="train nothing: write the rows whose runs are there")] = False,
) -> None:
    """Train every case that is missing and write Table 1: accuracy on motion digits, agreement for TransNetV2."""
    on_digits: list[list[str]] = []
    on_film: list[list[str]] = []
    judge = None
    for name in model or list(SUBJECTS):
        learned = SUBJECTS[name].dense_epochs > 0
        base = train_dense(runs, name) if learned else {}
        for case in table1_cases(name):
            if algorithm and case.algorithm not in algorithm:
                continue
            if only_finished and not (runs / case.folder / CARD).exists():
                continue
            card = train_case(runs, case)
            print(case, card["metrics"], flush=True)
            if learned:
                on_digits.append(_row(case, card, base))
            elif not algorithm:
                judge = judge or Judge(_WINDOWS)
                on_film.append([*_pruned_row(case, card), *judge(_published(runs / case.folder)).cells()])
    if on_digits and not algorithm:
        said = (f"{name}: {one.data}, {one.dense_epochs} epochs dense, then {one.epochs} pruning and retraining"
                for name, one in SUBJECTS.items() if one.dense_epochs)  # fmt: skip
        header = [*_PRUNED_HEAD, "dense accuracy", "accuracy"]
        write_section("table 1", f"Motion digits. {'; '.join(said)}.", header, on_digits)
    if judge is not None:
        subject = SUBJECTS["transnetv2"]
        about = (
            f"TransNetV2, published weights, its own teacher: {subject.data}, {subject.epochs} epochs pruning and "
            f"retraining; judged on {judge.frames:,} held-out frames of the same film."
        )
        write_section("table 1 agreement", about, [*_PRUNED_HEAD, *Agreement.HEAD], on_film)


_PRUNED_HEAD = ("model", "algorithm", "scheme", "MACs after pruning", "rate")


def _pruned_row(case: Case, card: dict[str, Any]) -> list[str]:
    pruning = card["pruning"]
    return [case.model, case.algorithm, case.scheme, f"{pruning['macs'] / 1e6:,.1f} M", f"{pruning['rate']:.2f}x"]


def _published(folder: Path) -> nn.Module:
    """TransNetV2, logits, with the pruned weights of the run in ``folder``."""
    network = Logits(models.create("transnetv2"))
    load_weights(network, read_weights(folder / MODEL), folder / MODEL)
    return network.eval()


def _row(case: Case, card: dict[str, Any], base: dict[str, Any]) -> list[str]:
    return [*_pruned_row(case, card), f"{_accuracy(base):.1%}", f"{_accuracy(card):.1%}"]


# The paper's Table 2: KGS at these rates.
NETWORKS = {"c3d": 3.6, "r2plus1d-18": 3.2, "s3d": 2.1}
GROUP = (16, 4)
PEERS = ("pytorch", "onnxruntime", "openvino", "mnn")
# What is built of each network: name in the table, scheme it is pruned with, and which dense kernels it may use.
BUILDS: dict[str, tuple[str, Literal["auto", "direct"]]] = {
    "dense": ("", "auto"),
    "dense-direct": ("", "direct"),
    "kgs-direct": ("kgs", "direct"),
    "kgs": ("kgs", "auto"),
    "slices": ("slices", "auto"),
    "vanilla-direct": ("vanilla", "direct"),
    "vanilla": ("vanilla", "auto"),
    "filter": ("filter", "auto"),
}
Artifacts = Annotated[Path, typer.Option(help="where built networks are kept")]
Threads = Annotated[int, typer.Option(min=1)]


@app.command()
def build(
    artifacts: Artifacts = Path("build/rt3d/artifacts"),
    network: Annotated[list[str] | None, typer.Option(help="c3d, r2plus1d-18, s3d")] = None,
    threads: Threads = 2,
    group: Annotated[tuple[int, int], typer.Option(help="filters and channels of a kernel group")] = GROUP,
    only: Annotated[str, typer.Option(help="of the builds, comma between")] = ",".join(BUILDS),
) -> None:
    """Compile what table2 times and export the dense network for its peers; what is there already stays."""
    for name in network or list(NETWORKS):
        for key in BUILDS:
            if key in only.split(","):
                print(name, key, built_as(key, name, artifacts / f"{name}-{threads}" / key, threads, group), flush=True)
        if not (artifacts / "peers" / name).exists():
            export_case(name, models.create(name), models.example_inputs(name)[0], artifacts / "peers")


def built_as(key: str, name: str, folder: Path, threads: int, group: tuple[int, int] = GROUP) -> dict[str, Any]:
    """Multiply-accumulates, those of the dense network, and kernels of one of ``BUILDS``; what is there stays."""
    kept = folder / "pruned.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    scheme, conv = BUILDS[key]
    pruned, inputs = models.create(name), models.example_inputs(name)
    dense = macs = count_macs(pruned, *inputs)
    if scheme:
        macs = prune_to_rate(pruned, inputs, scheme, NETWORKS[name], *group).macs
    artifact = _built(folder, pruned, inputs, threads, conv)
    kernels = Counter(layer.kernel.split("_f32")[0] for layer in artifact.manifest.layers)
    facts = {"dense_macs": dense, "macs": macs, "kernels": dict(kernels)}
    write_atomically(kept, json.dumps(facts).encode())
    return facts


@app.command()
def table2(
    artifacts: Artifacts = Path("build/rt3d/artifacts"),
    network: Annotated[list[str] | None, typer.Option(help="c3d, r2plus1d-18, s3d")] = None,
    threads: Threads = 2,
    runs: Annotated[int, typer.Option(min=2, help="runs of each network, at least")] = 10,
    peers: Annotated[str, typer.Option(help="compared engines, comma between")] = ",".join(PEERS),
) -> None:
    """Time what `build` made, dense and pruned by magnitude, and its peers, in turns; only time counts here.

    Networks measured at other times stay in benchmarks/results/rt3d.json, so each can be timed by itself.
    """
    found = results().get("table2", {})
    for name in network or list(NETWORKS):
        base = artifacts / f"{name}-{threads}"
        if not (base / "kgs" / "pruned.json").exists():
            raise DanceError(f"{base} holds no compiled networks: python -m benchmarks.rt3d build --network {name}")
        built = {key: load_artifact(base / key) for key in BUILDS if (base / key / "pruned.json").exists()}
        case = PeerCase(name, 0, artifacts / "peers" / name)
        seconds = latencies(built, models.example_inputs(name), case, [p for p in peers.split(",") if p], threads, runs)
        facts = {key: json.loads((base / key / "pruned.json").read_text()) for key in built}
        found[name] = {"threads": threads, "runs": runs, "seconds": seconds, "facts": facts}
        keep_result("table2", found)
    write_table2(found)


@app.command(name="write-table2")
def write_table2_command() -> None:
    """Write Table 2 from the last measurements."""
    write_table2(results().get("table2", {}))


def write_table2(found: Mapping[str, Any]) -> None:
    """Both halves of Table 2: milliseconds of everything, then what of the rate became speed."""
    names = [name for name in NETWORKS if name in found]
    columns = [*PEERS, *BUILDS]
    times = []
    ratios = []
    for name in names:
        seconds, facts = found[name]["seconds"], found[name]["facts"]
        times.append([name, *(f"{1e3 * seconds[key]:.0f}" if key in seconds else "" for key in columns)])
        for key in (key for key, (scheme, _) in BUILDS.items() if scheme):
            if key not in seconds:
                continue
            rate = facts[key]["dense_macs"] / facts[key]["macs"]
            direct, auto = (seconds[dense] / seconds[key] for dense in ("dense-direct", "dense"))
            ratios.append(
                [name, key, f"{facts[key]['macs'] / 1e9:.1f} G", f"{rate:.2f}x", f"{direct:.2f}x",
                 f"{direct / rate:.2f}", f"{auto:.2f}x", f"{auto / rate:.2f}"]
            )  # fmt: skip
    about = (
        f"Median milliseconds of {min(found[name]['runs'] for name in names)} runs or more, all in turns, "
        f"{found[names[0]]['threads']} threads, one clip, magnitude pruning. *dense* and the others take Winograd's "
        "algorithm layer by layer where it is predicted to be faster than skipping; *-direct* do not."
    )
    write_section("table 2", about, ["network", *columns], times)
    header = ["network", "build", "MACs", "rate", "over dense-direct", "÷ rate", "over dense", "÷ rate"]
    write_section("table 2 ratios", "What of the rate became speed:", header, ratios)


class _Peer(LoadedNetwork):
    """Another engine in its own process, timed like one of ours."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise DanceError("A peer's outputs stay in its process.")

    def _time(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        before = len(self._engine.turns)
        for _ in range(repeats):
            self._engine.run()
        if self._engine.failed:
            raise DanceError(f"{self._engine.peer} failed: {self._engine.failed}")
        return [turn.wall for turn in self._engine.turns[before:]]

    def _kernels(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[KernelTime]:
        raise DanceError("Peers' kernels are not profiled here.")

    def peak_memory(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        return None


def _built(
    folder: Path,
    network: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    threads: int,
    conv: Literal["auto", "direct"] = "auto",
    group: tuple[int, int] | None = None,
) -> Artifact:
    options = Options(threads=threads, conv=conv, kernel_group=group)
    return build_network(network, folder, example_inputs=inputs, check=False, options=options).artifact


def latencies(
    built: Mapping[str, Artifact],
    inputs: tuple[torch.Tensor, ...],
    case: PeerCase,
    peers: Sequence[str],
    threads: int,
    runs: int,
) -> dict[str, float]:
    """Median seconds of each artifact and peer, measured in turns on this machine; a peer that fails is left out."""
    engines = []
    try:
        with open_device("local") as session:
            contenders = {}
            for key, artifact in built.items():
                loaded = session.load(artifact)
                names = [tensor.name for tensor in loaded.manifest.inputs]
                feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
                contenders[key] = Contender(loaded, feed)
            for peer in peers:
                engines.append(Engine(peer, case, threads))
                if engines[-1].failed:
                    print(f"{peer}: {engines[-1].failed}")
                else:
                    contenders[peer] = Contender(_Peer(engines[-1]), {})
            in_turns(list(contenders.values()), runs, 0.0)
            return {key: float(np.median(contender.seconds)) for key, contender in contenders.items()}
    finally:
        for engine in engines:
            engine.close()


# ---- one layer ---------------------------------------------------------------------------------------------------

# conv3 of C3D at half its channels, where one call takes tens of milliseconds.
LAYER = SynthesisedLayer(128, 128, (3, 3, 3), (8, 28, 28))
SPARSITIES = (0.05, 0.08, 0.10, 0.15, 0.25, 0.50, 1 - 1 / 2.6, 1 - 1 / 3.6)


@app.command()
def layer(
    artifacts: Artifacts = Path("build/rt3d/layer"),
    threads: Threads = 1,
    runs: Annotated[int, typer.Option(min=2, help="runs of each build, at least")] = 15,
    group: Annotated[tuple[int, int], typer.Option(help="filters and channels of a kernel group")] = GROUP,
    only_build: Annotated[bool, typer.Option(help="compile what is missing and time nothing")] = False,
) -> None:
    """One convolution dense, direct and Winograd, and pruned at rising rates: its break-even, vanilla next to KGS."""
    weights: dict[str, np.ndarray | None] = {"dense": None, "dense-direct": None}
    for share in SPARSITIES:
        for scheme in ("vanilla", "kgs"):
            weights[f"{scheme} {share:.3f}"] = LAYER.weight(*group, 1 / (1 - share), scheme)
    built = {}
    for key, weight in weights.items():
        folder = artifacts / key.replace(" ", "-")
        pruned = LAYER.weight(1, 1, 1.0) if weight is None else weight
        network, clip = one_convolution(LAYER, pruned)
        if not folder.exists():
            conv: Literal["auto", "direct"] = "auto" if key == "dense" else "direct"
            _built(folder, network, (clip,), threads, conv, None if weight is None else group)
        built[key] = load_artifact(folder)
    if only_build:
        return
    seconds = latencies(built, (clip,), PeerCase("", 0, artifacts), (), threads, runs)
    keep_result("layer", {"threads": threads, "group": group, "seconds": seconds})
    rows = []
    for share in SPARSITIES:
        vanilla, kgs = (seconds[f"{scheme} {share:.3f}"] for scheme in ("vanilla", "kgs"))
        faster = seconds["dense-direct"] / kgs
        cells = (faster, faster * (1 - share), seconds["dense"] / kgs, kgs / vanilla)
        rows.append([f"{share:.0%}", f"{1e3 * kgs:.2f}", *(f"{cell:.2f}" for cell in cells)])
    about = (
        f"{_told(LAYER)}, groups of {group[0]}x{group[1]}, {threads} thread(s): dense direct "
        f"{1e3 * seconds['dense-direct']:.2f} ms, dense Winograd {1e3 * seconds['dense']:.2f} ms."
    )
    header = ["zero weights", "KGS (ms)", "over direct", "÷ rate", "over Winograd", "KGS / vanilla time"]
    write_section("layer", about, header, rows)


class Masked(nn.Module):
    """Two convolutions whose outputs are masked by what a DANCE controller would decide: here, an input.

    ``clip`` (1, C, T, H, W); ``frames`` (1, 1, T, 1, 1) and ``positions`` (1, 1, 1, H, W) are alive where positive.
    """

    def __init__(self, weights: Sequence[np.ndarray]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(next(one_convolution(LAYER, weight)[0].children()) for weight in weights)

    def forward(self, clip: torch.Tensor, frames: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        alive = ((frames > 0).to(clip.dtype), (positions > 0).to(clip.dtype))
        for convolution in self.convolutions:
            clip = torch.relu(convolution(clip)) * alive[0] * alive[1]
        return clip


@app.command()
def combined(
    artifacts: Artifacts = Path("build/rt3d/combined"),
    threads: Threads = 1,
    runs: Annotated[int, typer.Option(min=2, help="runs of each build, at least")] = 15,
    rate: Annotated[float, typer.Option(min=1.1)] = 2.6,
    only_build: Annotated[bool, typer.Option(help="compile what is missing and time nothing")] = False,
) -> None:
    """Two layers pruned in kernel groups, under masks of half the tiles and of half the work by frames and tiles."""
    dense, pruned = LAYER.weight(1, 1, 1.0), LAYER.weight(*GROUP, rate)
    clip = torch.randn(1, LAYER.channels_in, *LAYER.size, generator=torch.Generator().manual_seed(0))
    ones = (torch.ones(1, 1, LAYER.size[0], 1, 1), torch.ones(1, 1, 1, *LAYER.size[1:]))
    built = {}
    for key, weight in {"dense": dense, "kgs": pruned}.items():
        if not (artifacts / key).exists():
            network, used = Masked([weight, weight]).eval(), GROUP if key == "kgs" else None
            _built(artifacts / key, network, (clip, *ones), threads, "direct", used)
        built[key] = load_artifact(artifacts / key)
    if only_build:
        return
    frames = torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1]).reshape(ones[0].shape)
    masks = {
        "none": ones,
        "8 of 16 tiles": (ones[0], _tiles(8)),
        "7 of 8 frames, 11 of 16 tiles": (frames, _tiles(11)),
    }
    seconds, macs = _maskedlatencies(built, clip, masks, runs)
    rows = []
    base, work = seconds["dense", "none"], macs["dense", "none"]
    for mask in masks:
        for key in built:
            less, faster = work / macs[key, mask], base / seconds[key, mask]
            figures = [f"{1e3 * seconds[key, mask]:.2f}", f"{less:.2f}x", f"{faster:.2f}x", f"{faster / less:.2f}"]
            rows.append([mask, key, *figures])
    keep_result("combined", rows)
    header = ["masks", "weights", "milliseconds", "fewer MACs", "faster", "÷"]
    about = f"Two such layers, KGS {rate:g}x, {threads} thread(s), planning of the lists included; MACs as executed."
    write_section("combined", about, header, rows)


def _told(layer: SynthesisedLayer) -> str:
    """The layer in words."""
    kernel, size = ("x".join(map(str, triple)) for triple in (layer.kernel, layer.size))
    return f"{layer.channels_in} to {layer.channels_out} channels, {kernel}, {size} positions"


def _tiles(kept: int) -> torch.Tensor:
    """A mask of ``LAYER``'s positions that keeps so many of 4x4 tiles, evenly drawn."""
    tiles = torch.zeros(16)
    tiles[torch.randperm(16, generator=torch.Generator().manual_seed(1))[:kept]] = 1
    edges = [extent // 4 for extent in LAYER.size[1:]]
    spread = tiles.reshape(4, 4).repeat_interleave(edges[0], 0).repeat_interleave(edges[1], 1)
    return spread.reshape(1, 1, 1, *LAYER.size[1:])


def _maskedlatencies(
    built: Mapping[str, Artifact],
    clip: torch.Tensor,
    masks: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    runs: int,
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """Median seconds and executed multiply-accumulates of each artifact under each pair of masks, in turns."""
    with open_device("local") as session:
        contenders = {}
        for key, artifact in built.items():
            loaded = session.load(artifact)
            names = [tensor.name for tensor in loaded.manifest.inputs]
            for mask, given in masks.items():
                feed = {name: value.numpy() for name, value in zip(names, (clip, *given), strict=True)}
                contenders[key, mask] = Contender(loaded, feed)
        in_turns(list(contenders.values()), runs, 0.0)
        seconds = {key: float(np.median(contender.seconds)) for key, contender in contenders.items()}
        macs = {
            key: float(sum((kernel.work or {}).get("macs") or 0 for kernel in one.network.kernels(one.inputs, 1)))
            for key, one in contenders.items()
        }
        return seconds, macs


PHONE_LAYER = SynthesisedLayer(64, 64, (3, 3, 3), (4, 14, 14))


@app.command()
def instructions(
    artifacts: Artifacts = Path("build/rt3d/instructions"),
    target: Annotated[str, typer.Option(help="an aarch64 target")] = "snapdragon",
) -> None:
    """Instructions that one layer takes on the emulated phone, dense and pruned in groups that fit its registers."""
    from .instructions import instructions as count

    counted = {}
    cases: dict[str, tuple[tuple[int, int] | None, float]] = {"dense": (None, 1.0)}
    cases |= {f"{gm}x{gn} {rate:g}": ((gm, gn), rate) for gm, gn in ((8, 4), (16, 4)) for rate in (2.6, 3.6)}
    for key, (group, rate) in cases.items():
        network, clip = one_convolution(PHONE_LAYER, PHONE_LAYER.weight(*(group or (1, 1)), rate))
        folder = artifacts / key.replace(" ", "-")
        if not folder.exists():
            options = Options(threads=1, conv="direct", kernel_group=group)
            build_network(network, folder, target=target, example_inputs=(clip,), check=False, options=options)
        counted[key] = count(load_artifact(folder))
    rows = []
    for key, (group, rate) in cases.items():
        if group is not None:
            fewer = counted["dense"] / counted[key]
            name = "x".join(map(str, group))
            rows.append([name, f"{rate:g}x", f"{counted[key] / 1e6:.1f} M", f"{fewer:.2f}x", f"{fewer / rate:.2f}"])
    keep_result("instructions", counted)
    about = (
        f"{_told(PHONE_LAYER)}, built for {target}, one thread, run in emulation: {counted['dense'] / 1e6:.1f} M "
        "instructions dense (direct)."
    )
    write_section("instructions", about, ["group", "rate", "instructions", "fewer", "÷ rate"], rows)


# ---- table 3 -----------------------------------------------------------------------------------------------------

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
    seconds = latencies(built, inputs, PeerCase("", 0, runs), (), threads, times)
    rows = []
    for vanilla in (case for case in cases if case.scheme == "vanilla"):
        as_good = [
            case for case in cases if case.scheme == "kgs" and _accuracy(cards[case]) >= _accuracy(cards[vanilla])
        ]
        for case in (vanilla, *sorted(as_good, key=lambda case: case.rate)[-1:]):
            row = _row(case, cards[case], base)
            rows.append([row[0], row[2], row[5], row[6], row[3], row[4], f"{1e3 * seconds[str(case.folder)]:.2f}"])
    header = ["model", "scheme", "dense accuracy", "accuracy", "MACs after pruning", "rate", "latency (ms)"]
    about = f"Each vanilla network above the KGS network of the highest rate that is as accurate; {threads} threads."
    write_section("table 3", about, header, rows)


def _network(runs: Path, case: Case, card: dict[str, Any]) -> nn.Module:
    network = models.create(case.model, num_classes=len(card["classes"]))
    models.load_state(network, read_weights(runs / case.folder / MODEL))
    return network.eval()


def _accuracy(card: dict[str, Any]) -> float:
    return float(card["metrics"]["accuracy"])


def results() -> dict[str, Any]:
    """What earlier commands measured."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def keep_result(name: str, value: Any) -> None:
    """Keep ``value`` in benchmarks/results/rt3d.json beside what other commands measured."""
    write_atomically(RESULTS, (json.dumps({**results(), name: value}, indent=1) + "\n").encode())


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
