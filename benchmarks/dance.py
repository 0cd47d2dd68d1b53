"""The figures of docs/dance.md, each by one command:

    python -m benchmarks.dance train         the shipped network's recipe, its ablation and its control (resumable)
    python -m benchmarks.dance ship          the trained network into the package, with its card
    python -m benchmarks.dance convergence   curves of AVA and AAP, as the supplement's figures 13 and 14
    python -m benchmarks.dance accuracy      accuracy and MACs of dense, AVA, AAP and the ablation
    python -m benchmarks.dance ablation      the same from the runs' cards, on the clips by which each chose its epoch
    python -m benchmarks.dance exactness     built for this machine: logits and MACs of every held-out clip
    python -m benchmarks.dance latency       latency by clip and by layer of what `exactness` built
    python -m benchmarks.dance transnet      TransNetV2 pruned without labels: MACs against agreement

Training runs are kept in --runs and taken up again where they were; tables are written into the page, pictures beside.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from dance_tvm import train
from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity import checkpoint, training
from dance_tvm.sparsity.dance import trained
from dance_tvm.sparsity.dance.controller import Masks
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dance.method import controller_of
from dance_tvm.sparsity.dance.sites import trace
from dance_tvm.sparsity.data import load_data
from dance_tvm.sparsity.motion_digits import MotionDigits

from .agreement import Agreement, Judge, pruned_transnet

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
PAGE = Path(__file__).parent.parent / "docs" / "dance.md"
PICTURES = PAGE.parent / "images"
Runs = Annotated[Path, typer.Option(help="folder of the training runs")]
Threads = Annotated[int, typer.Option(min=1)]
Work = Annotated[Path, typer.Option(help="folder for the artifacts")]
#: Folders of the artifacts: both networks with direct convolutions only, and as `dance-tvm build` makes them.
PRUNED_DIRECT, PRUNED = "dance-pruned-direct", "dance-pruned"
DENSE_DIRECT, DENSE_DEFAULT = "dance-dense-direct", "dance-dense-default"

MODEL = "c3d-mini"
CHOOSING = 512  # held-out clips by which a run chooses its best epoch
JUDGING = 2048  # further held-out clips, by which no run has chosen anything: accuracies are told on these
_DENSE: dict[str, Any] = {"data": "motion-digits,train=2048,test=512", "epochs": 5, "lr": 2e-3, "batch": 32}
_AVA: dict[str, Any] = {"data": "motion-digits,train=1024,test=512", "epochs": 5, "lr": 5e-4, "batch": 16}
_AAP: dict[str, Any] = {"data": "motion-digits,train=3072,test=512", "epochs": 4, "lr": 1e-3, "batch": 16}
_SHORT: dict[str, Any] = {"data": "motion-digits,train=1024,test=512", "epochs": 3, "lr": 1e-3, "batch": 16}
_CONTROL: dict[str, Any] = {**_AAP, "lr": 5e-4}
_AAP_OPTIONS = {"target_macs": 0.47, "ramp": 0.5, "backbone_rate": 0.5}
#: TransNetV2's budgets, met before the first step by leaving channels out and fitting the rest. Frames and positions
#: stay: a network that looks for cuts must see every frame. A step is one window, so its gradient is noisy and its rate
#: small: at five times the rate agreement on training frames that were set aside fell, with fifteen times further.
BUDGETS = (0.8, 0.65, 0.5)
_BUDGET_OPTIONS = {
    "axes": ("channels",), "start": 16, "refit": 24, "hint": 0.3, "ramp": 0.0, "distill": 0.0, "backbone_rate": 1.0,
}  # fmt: skip
_BUDGET_RATE = 6e-6
_SHORT_OPTIONS = {**_AAP_OPTIONS, "momentum": 0.1}  # 192 steps are too few for averages over fifty


class Run(NamedTuple):
    """One training run: its method, the run it starts from, the settings, the method's options, and its title."""

    method: str
    start: str | None
    settings: dict[str, Any]
    options: dict[str, Any]
    title: str


#: "aap" is the network that ships; "control" has no masks but as many steps on as many clips.
RECIPE = {
    "dense": Run("dense", None, _DENSE, {}, "dense"),
    "ava": Run("ava", "dense", _AVA, {}, "AVA"),
    "aap": Run("aap", "ava", _AAP, _AAP_OPTIONS, "AAP, all axes (ships)"),
    "short": Run("aap", "ava", _SHORT, _SHORT_OPTIONS, "AAP, all axes, short"),
    "positions": Run("aap", "ava", _SHORT, {**_SHORT_OPTIONS, "axes": ("positions",)}, "AAP, positions alone, short"),
    "channels": Run("aap", "ava", _SHORT, {**_SHORT_OPTIONS, "axes": ("channels",)}, "AAP, channels alone, short"),
    "frames": Run("aap", "ava", _SHORT, {**_SHORT_OPTIONS, "axes": ("frames",)}, "AAP, frames alone, short"),
    "control": Run("dense", "ava", _CONTROL, {}, "dense, trained on for as long as AAP"),
    "without-ava": Run("aap", "dense", _SHORT, _SHORT_OPTIONS, "AAP without AVA, all axes, short"),
}


@app.command("train")
def train_all(runs: Runs = Path("runs/dance"), only: str | None = None, threads: Threads = 1) -> None:
    """Trains what is not there yet; `--only aap` trains one run and what it starts from."""
    for name in _with_what_they_start_from(only) if only else list(RECIPE):
        recipe, out = RECIPE[name], runs / name
        if (out / training.MODEL).exists():
            continue
        init = runs / recipe.start / training.MODEL if recipe.start else None
        resume = (out / training.CHECKPOINT).exists()
        train.run(
            method=recipe.method, model=MODEL, out=out, init=init, resume=resume, threads=threads,
            options=recipe.options, console=typer_console(), **recipe.settings,
        )  # fmt: skip


@app.command()
def ship(runs: Runs = Path("runs/dance")) -> None:
    """Puts the trained network, with the command that made it on its card, where the package keeps it."""
    tensors, card = checkpoint.read_checkpoint(runs / "aap" / training.MODEL)
    card |= {"command": "python -m benchmarks.dance train --only aap", "classes_mean": "how the digit moves"}
    checkpoint.write_checkpoint(trained.SHIPPED, tensors, card)
    checkpoint.write_atomically(trained.SHIPPED.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())


def _with_what_they_start_from(name: str) -> list[str]:
    if name not in RECIPE:
        raise DanceError(f"the recipe has no run called {name!r}; choose one of {', '.join(RECIPE)}")
    start = RECIPE[name].start
    return [*(_with_what_they_start_from(start) if start else []), name]


def typer_console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


# ---- convergence ----


@app.command()
def convergence(runs: Runs = Path("runs/dance")) -> None:
    """Curves of the two steps, from the tables that training wrote."""
    ava, aap = (_curves(runs / name / training.CURVES) for name in ("ava", "aap"))
    _panels("dance-ava.png", ava, {
        "AVA: training loss": {"loss/task": "cross-entropy"},
        "AVA: accuracy": {"accuracy": "held-out clips"},
        "AVA: deviation of activity (weighted sum)": {"variability": "held-out clips"},
    })  # fmt: skip
    _panels("dance-aap.png", aap, {
        "AAP: training loss": {"loss/task": "cross-entropy", "loss/compute": "compute term"},
        "AAP: accuracy and MACs": {"accuracy": "accuracy, held-out clips", "share": "share of the dense MACs"},
        "AAP: learned threshold θ": {"theta": "θ"},
    })  # fmt: skip


def _panels(name: str, rows: list[dict[str, float]], panels: dict[str, dict[str, str]]) -> None:
    """One panel a title; in it one line for each column of the table, by epoch."""
    plot = _pyplot()
    figure, axes = plot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
    epochs = [int(row["epoch"]) + 1 for row in rows]
    for panel, (title, columns) in zip(axes, panels.items(), strict=True):
        for marker, (column, label) in zip("os", columns.items(), strict=False):
            panel.plot(epochs, [row[column] for row in rows], f"{marker}-", label=label)
        panel.set(title=title, xlabel="epoch", xticks=epochs)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    _save(figure, name)


def _curves(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        raise DanceError(f"{path} is missing: run `python -m benchmarks.dance train` first")
    with path.open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


# ---- accuracy and MACs ----


@app.command()
def accuracy(runs: Runs = Path("runs/dance"), threads: Threads = 1) -> None:
    """Every run of the recipe that is there, on the same held-out clips, which no run has chosen its epoch by."""
    torch.set_num_threads(threads)
    clips: Subset[Any] = Subset(MotionDigits(CHOOSING + JUDGING, held_out=True), range(CHOOSING, CHOOSING + JUDGING))
    rows = []
    for name, recipe in RECIPE.items():
        path = runs / name / training.MODEL
        if not path.exists():
            continue
        network, card = _network(path, recipe.method)
        correct, executed, dense, kept = _evaluate(network, clips)
        share = executed / dense
        length = f"{recipe.settings['epochs']} x {card['data']['clips']:,}"
        rows.append([
            recipe.title, length, f"{100 * correct.mean():.2f} %", f"{executed.mean() / 1e6:.1f} M",
            f"{1 / share.mean():.2f}x", f"{share.min():.2f} … {share.max():.2f}",
            *(f"{value:.2f}" if value is not None else "–" for value in kept),
            f"{card['theta']:.3f}" if "theta" in card else "–",
        ])  # fmt: skip
    head = (
        "network",
        "epochs x clips",
        "accuracy",
        "MACs",
        "fewer",
        "share by clip",
        "frames",
        "channels",
        "positions",
        "θ",
    )
    _write_section("accuracy", _table(head, rows))


@app.command()
def ablation(runs: Runs = Path("runs/dance")) -> None:
    """What every run's card says of the held-out clips by which it chose its epoch."""
    rows = []
    for name, recipe in RECIPE.items():
        path = runs / name / training.MODEL
        if not path.exists():
            continue
        told = checkpoint.read_checkpoint(path)[1]["metrics"]
        kept = [told.get(f"kept_{axis}") for axis in ("frames", "channels", "positions")]
        rows.append([
            recipe.title, f"{100 * told['accuracy']:.1f} %", f"{1 / told.get('share', 1):.2f}x",
            *("–" if share is None else f"{share:.2f}" for share in kept),
        ])  # fmt: skip
    _write_section("ablation", _table(("network", "accuracy", "fewer MACs", "frames", "channels", "positions"), rows))


def _network(path: Path, method: str) -> tuple[nn.Module, dict[str, Any]]:
    if method == "aap":
        return trained.load(path)
    tensors, card = checkpoint.read_checkpoint(path)
    network = trained.dense(card)
    checkpoint.load_weights(network, checkpoint.without_prefix("network", tensors), path)
    return trace(network.eval(), tuple(card["clip_shape"]))[0].eval(), card


@torch.no_grad()
def _evaluate(network: Any, clips: Any) -> tuple[np.ndarray, np.ndarray, float, list[float | None]]:
    """Correct (clips,), executed MACs (clips,), dense MACs, and the mean kept share of frames, channels, positions."""
    counter = MacCounter(network)
    correct, executed, kept = [], [], []
    for batch, labels in DataLoader(clips, 32):
        correct.append((network(batch).argmax(1) == labels).numpy())
        masks = _decisions(network)
        executed.append(counter.count(masks, len(batch)).executed.expand(len(batch)).numpy())
        kept.append([_mean(site[axis] for site in masks) for axis in range(3)])
    shares = [None if axis[0] is None else float(np.mean(axis)) for axis in zip(*kept, strict=True)]
    return np.concatenate(correct), np.concatenate(executed), counter.count([], 1).dense, shares


def _decisions(network: nn.Module) -> list[Masks]:
    return controller_of(network).decisions if "controller" in dict(network.named_children()) else []


def _mean(masks: Iterable[Tensor | None]) -> float | None:
    present = [float(mask.mean()) for mask in masks if mask is not None]
    return sum(present) / len(present) if present else None


# ---- compiled ----


@app.command()
def exactness(
    work: Work = Path("artifacts"),
    clips: Annotated[int, typer.Option(min=2, help="held-out clips to compare")] = CHOOSING,
    model: Annotated[Path | None, typer.Option(help="a model.safetensors of --method aap")] = None,
    threads: Threads = 1,
) -> None:
    """Builds the pruned network and its dense twin, and compares the former with PyTorch on every held-out clip."""
    from dance_tvm.compiler.build import build_network
    from dance_tvm.compiler.pipeline import Options
    from dance_tvm.device import open_device

    torch.set_num_threads(threads)
    network, card = trained.load(model or trained.SHIPPED)
    twin = trained.dense(card)
    own = network.state_dict()
    twin.load_state_dict({name: own[name] for name in twin.state_dict()})
    example = (torch.zeros(1, *card["clip_shape"]),)
    sources = {PRUNED_DIRECT: network, PRUNED: network, DENSE_DIRECT: twin, DENSE_DEFAULT: twin}
    built = {
        name: build_network(
            torch.export.export(source.eval(), example), work / name,
            options=Options(threads=threads, conv="direct" if name in (PRUNED_DIRECT, DENSE_DIRECT) else "auto"),
            reuse=True,
        ).artifact
        for name, source in sources.items()
    }  # fmt: skip
    held_out = MotionDigits(clips, held_out=True)
    seen = [held_out[index][0] for index in range(clips)]
    name = built[PRUNED].manifest.inputs[0].name
    with open_device("local") as device:
        said = [_exactness(network, device.load(built[which]), name, seen) for which in (PRUNED_DIRECT, PRUNED)]
    _write_section("exactness", f"Built with `--conv direct`: {said[0]}\n\nBuilt by default: {said[1]}")


@app.command()
def latency(
    work: Work = Path("artifacts"),
    clips: Annotated[int, typer.Option(min=2, help="held-out clips to time")] = 16,
    seconds: Annotated[float, typer.Option(min=0.05, help="for each clip and network")] = 0.5,
    layers_of: Annotated[int, typer.Option(min=0, help="clip whose layers are told")] = 0,
) -> None:
    """The four artifacts of `exactness`, timed in turns clip by clip; wants a machine with nothing else to do."""
    from dance_tvm.artifact.folder import load_artifact
    from dance_tvm.benchmarking.measure import Contender, in_turns
    from dance_tvm.device import open_device

    folders = (PRUNED_DIRECT, PRUNED, DENSE_DIRECT, DENSE_DEFAULT)
    artifacts = [load_artifact(work / folder) for folder in folders]
    held_out = MotionDigits(max(clips, layers_of + 1), held_out=True)
    name = artifacts[0].manifest.inputs[0].name
    rows, found = [], []
    with open_device("local") as device:
        networks = [device.load(artifact) for artifact in artifacts]
        for index in range(clips):
            clip = {name: held_out[index][0][None].numpy()}
            contenders = [Contender(network, clip) for network in networks]
            in_turns(contenders, runs=9, seconds=seconds)
            ours, dense = (_conv_macs(network.kernels(clip, repeats=0)) for network in (networks[0], networks[2]))
            assert ours is not None
            assert dense is not None
            timed = Timed._make([index, *(float(np.median(each.seconds)) for each in contenders), dense / ours])
            found.append(timed)
            motion = f"{held_out.classes[held_out.label(index)]}, {held_out.difficulty(index):.2f}"
            rows.append([str(index), motion, *(f"{1e3 * part:.2f}" for part in timed[1:5]), *_ratios([timed])])
        clip = {name: held_out[layers_of][0][None].numpy()}
        _write_section("layers", _by_layer(networks[1].kernels(clip, 9), networks[3].kernels(clip, 9)))
    rows.append(["mean", "", "", "", "", "", *_ratios(found)])
    head = (
        "clip", "motion, difficulty", "pruned direct ms", "pruned ms", "dense direct ms", "dense ms", "fewer MACs",
        "direct: faster", "direct: faster ÷ fewer", "default: faster",
    )  # fmt: skip
    _write_section("latency", _table(head, rows))
    _latency_picture(found)


def _ratios(clips: Sequence[Timed]) -> list[str]:
    """Means over clips: fewer MACs, direct speed-up, that over fewer MACs, speed-up of the default builds."""
    rows = [
        (clip.fewer, clip.dense_direct / clip.pruned_direct, clip.dense_direct / clip.pruned_direct / clip.fewer,
         clip.dense / clip.pruned) for clip in clips
    ]  # fmt: skip
    return [f"{value:.2f}" for value in np.mean(rows, axis=0)]


class Timed(NamedTuple):
    """One clip: seconds of each build, and how many times fewer MACs the pruned network executed."""

    clip: int
    pruned_direct: float
    pruned: float
    dense_direct: float
    dense: float
    fewer: float


def _exactness(network: nn.Module, compiled: Any, name: str, clips: Sequence[Tensor]) -> str:
    """Compares logits and MACs of the compiled network with the masked PyTorch network's, clip by clip."""
    counter = MacCounter(network)
    largest, scale, same_class = 0.0, 0.0, 0
    same_macs: int | None = 0
    for clip in clips:
        with torch.no_grad():
            expected = network(clip[None]).numpy()
        found = next(iter(compiled.run({name: clip[None].numpy()}).values()))
        count = counter.count(controller_of(network).decisions, 1)
        executed = _conv_macs(compiled.kernels({name: clip[None].numpy()}, repeats=0))
        largest, scale = max(largest, float(np.abs(found - expected).max())), max(scale, float(np.abs(expected).max()))
        same_class += int(found.argmax() == expected.argmax())
        same_macs = None if executed is None or same_macs is None else same_macs + (executed == int(count.executed[0]))
    macs = (
        "its Winograd kernels skip whole tiles and count no multiplications."
        if same_macs is None
        else f"on {same_macs} of {len(clips)} the MACs counted by `MacCounter` equal those on the kernels' index lists "
        "exactly, the controller's included."
    )
    return (
        f"on {len(clips)} held-out clips the largest difference of a logit, relative to the largest of all, is "
        f"{largest / scale:.1e}; {same_class} of {len(clips)} have the same class; {macs}"
    )


def _conv_macs(kernels: Iterable[Any]) -> int | None:
    """Multiply-accumulates on the index lists of one call; None where a kernel, such as Winograd's, counts none."""
    counts = [call.work["macs"] for call in kernels if call.work]
    return None if None in counts else sum(counts)


def _by_layer(pruned: Sequence[Any], dense: Sequence[Any]) -> str:
    """The six longest kernels of each network in the order of their calls, and all others together."""
    rows = []
    for network, calls in (("dense", dense), ("pruned", pruned)):
        longest = sorted(calls, key=lambda call: -call.seconds)[:6]
        for call in (call for call in calls if call in longest):
            macs = (call.work or {}).get("macs")
            rows.append(
                [network, f"`{call.symbol}`", f"{1e3 * call.seconds:.3f}", f"{macs / 1e6:.2f} M" if macs else "–"]
            )
        others = sum(call.seconds for call in calls) - sum(call.seconds for call in longest)
        rows.append([network, "all others", f"{1e3 * others:.3f}", ""])
    return _table(("network", "kernel", "ms", "MACs executed"), rows)


def _latency_picture(found: Sequence[Timed]) -> None:
    plot = _pyplot()
    figure, axes = plot.subplots(figsize=(9, 3.2))
    places = np.arange(len(found))
    bars = {"dense_direct": "dense, direct", "pruned_direct": "pruned, direct", "dense": "dense", "pruned": "pruned"}
    for shift, (part, label) in zip((-0.3, -0.1, 0.1, 0.3), bars.items(), strict=True):
        axes.bar(places + shift, [1e3 * getattr(clip, part) for clip in found], 0.2, label=label)
    axes.set(xlabel="held-out clip", ylabel="ms", xticks=places)
    axes.legend(loc="upper right", ncols=4, fontsize="small")
    axes.margins(y=0.2)
    _save(figure, "dance-latency.png")


# ---- TransNetV2 ----


@app.command()
def transnet(
    runs: Runs = Path("runs/dance"),
    clips: Annotated[str, typer.Option(help="videos joined by '+'")] = "published",
    window: Annotated[int, typer.Option(min=8, help="frames a window")] = 50,
    steps: Annotated[int, typer.Option(min=2, help="training windows for each budget")] = 48,
    threads: Threads = 1,
) -> None:
    """The published network as its own teacher, pruned to each budget; held-out frames are told."""
    torch.set_num_threads(threads)
    data = f"transnet:{clips},window={window},most={steps}"
    for budget in BUDGETS:
        out = runs / f"transnet-{budget:g}-{steps}x{window}"
        if not (out / training.MODEL).exists():
            train.run(
                method="aap", model="transnetv2", data=data, out=out, threads=threads,
                resume=(out / training.CHECKPOINT).exists(), epochs=1, batch=1, lr=_BUDGET_RATE,
                options={"target_macs": budget, **_BUDGET_OPTIONS}, console=typer_console(),
            )  # fmt: skip
    judge = Judge(f"transnet:{clips},window={window}")
    rows = []
    for budget in BUDGETS:
        network, card = pruned_transnet(runs / f"transnet-{budget:g}-{steps}x{window}" / training.MODEL)
        counter, shares = MacCounter(network), []

        def note(network: nn.Module = network, counter: MacCounter = counter, shares: list[float] = shares) -> None:
            count = counter.count(_decisions(network), 1)
            shares.append(float(count.executed.mean() / count.dense))

        agreement = judge(network, note)
        share = float(np.mean(shares))
        rows.append([f"{budget:g}", f"{share:.3f}", f"{1 / share:.2f}x", *agreement.cells(), f"{card['theta']:.3f}"])
    head = ("target", "share of MACs", "fewer", *Agreement.HEAD, "θ")
    frames = f"{judge.frames:,} held-out frames, {len(load_data(data).train)} training windows a budget."
    _write_section("transnet", f"{frames}\n\n{_table(head, rows)}")


# ---- the page ----


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _write_section(name: str, text: str) -> None:
    """Puts `text` between the page's two comments of that name."""
    page = PAGE.read_text(encoding="utf-8")
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
    changed, count = re.subn(pattern, lambda found: found[1] + text + "\n" + found[2], page, flags=re.DOTALL)
    if not count:
        raise DanceError(f"{PAGE} has no section {name!r} to write into")
    checkpoint.write_atomically(PAGE, changed.encode())
    print(text)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise DanceError("pictures need matplotlib: pip install 'dance-tvm[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(PICTURES / name, dpi=110)
    print(f"wrote {PICTURES / name}")


if __name__ == "__main__":
    from dance_tvm.core.cli import start

    start(app, "python -m benchmarks.dance")
