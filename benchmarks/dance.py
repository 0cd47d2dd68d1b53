"""The figures of docs/dance.md, each by one command:

    python benchmarks/dance.py train         the shipped network's recipe and its ablation (resumable)
    python benchmarks/dance.py convergence   curves of AVA and AAP, as the supplement's figures 13 and 14
    python benchmarks/dance.py accuracy      accuracy and MACs of dense, AVA, AAP and the ablation
    python benchmarks/dance.py latency       built for this machine: exactness, latency by clip and by layer
    python benchmarks/dance.py transnet      TransNetV2 pruned without labels: MACs against agreement

Training runs are kept in --runs and taken up again where they were; tables are written into the page, pictures beside.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dance_tvm import train
from dance_tvm.errors import DanceError
from dance_tvm.sparsity import checkpoint, training
from dance_tvm.sparsity.dance import trained
from dance_tvm.sparsity.dance.controller import Masks
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dance.method import controller_of, prune
from dance_tvm.sparsity.dance.sites import trace
from dance_tvm.sparsity.dance.untrained import keep_at_random
from dance_tvm.sparsity.data import MOTIONS, MotionDigits

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
PAGE = Path(__file__).parent.parent / "docs" / "dance.md"
PICTURES = PAGE.parent / "images"
Runs = Annotated[Path, typer.Option(help="folder of the training runs")]
Threads = Annotated[int, typer.Option(min=1)]

MODEL = "c3d-mini"
HELD_OUT = 512
_DENSE: dict[str, Any] = {"data": "motion-digits,train=2048,test=512", "epochs": 5, "lr": 2e-3, "batch": 32}
_AVA: dict[str, Any] = {"data": "motion-digits,train=1024,test=512", "epochs": 2, "lr": 1e-3, "batch": 16}
_AAP: dict[str, Any] = {"data": "motion-digits,train=768,test=256", "epochs": 5, "lr": 1e-3, "batch": 16}
_AAP_OPTIONS = {"target_macs": 0.42, "ramp": 0.4}

#: name: (method, the run it starts from, settings, options). "aap" is the network that ships.
RECIPE: dict[str, tuple[str, str | None, dict[str, Any], dict[str, Any]]] = {
    "dense": ("dense", None, _DENSE, {}),
    "ava": ("ava", "dense", _AVA, {}),
    "aap": ("aap", "ava", _AAP, _AAP_OPTIONS),
    "frames": ("aap", "ava", _AAP, {**_AAP_OPTIONS, "axes": ("frames",)}),
    "channels": ("aap", "ava", _AAP, {**_AAP_OPTIONS, "axes": ("channels",)}),
    "positions": ("aap", "ava", _AAP, {**_AAP_OPTIONS, "axes": ("positions",)}),
    "aap without ava": ("aap", "dense", _AAP, _AAP_OPTIONS),
}


@app.command("train")
def train_all(runs: Runs = Path("runs/dance"), only: str | None = None, threads: Threads = 2) -> None:
    """Trains what is not there yet; `--only aap` trains one run and what it starts from."""
    wanted = _with_what_they_start_from(only) if only else list(RECIPE)
    for name in wanted:
        method, start, settings, options = RECIPE[name]
        out = runs / name.replace(" ", "-")
        if (out / training.MODEL).exists():
            continue
        init = runs / start / training.MODEL if start else None
        resume = (out / training.CHECKPOINT).exists()
        train.run(
            method=method, model=MODEL, out=out, init=init, resume=resume, threads=threads, options=options,
            console=typer_console(), **settings,
        )  # fmt: skip


def _with_what_they_start_from(name: str) -> list[str]:
    if name not in RECIPE:
        raise DanceError(f"the recipe has no run called {name!r}; choose one of {', '.join(RECIPE)}")
    start = RECIPE[name][1]
    return [*(_with_what_they_start_from(start) if start else []), name]


def typer_console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


# ---- convergence ----


@app.command()
def convergence(runs: Runs = Path("runs/dance")) -> None:
    """Curves of the two steps."""
    plot = _pyplot()
    ava, aap = (_curves(runs / name / training.CURVES) for name in ("ava", "aap"))
    figure, (left, right) = plot.subplots(1, 2, figsize=(9, 3.2))
    epochs = [row["epoch"] + 1 for row in ava]
    left.plot(epochs, [row["loss/task"] for row in ava], "o-", label="training loss")
    left.plot(epochs, [row["accuracy"] for row in ava], "s-", label="held-out accuracy")
    left.set(title="AVA: loss and accuracy", xlabel="epoch", xticks=epochs)
    left.legend()
    right.plot(epochs, [row["variability"] for row in ava], "o-")
    right.set(title="AVA: variability of activations", xlabel="epoch", xticks=epochs)
    _save(figure, "dance-ava.png")

    figure, (left, right) = plot.subplots(1, 2, figsize=(9, 3.2))
    epochs = [row["epoch"] + 1 for row in aap]
    left.plot(epochs, [row["accuracy"] for row in aap], "s-", label="held-out accuracy")
    left.plot(epochs, [row["share"] for row in aap], "o-", label="share of the dense MACs")
    left.set(title="AAP: accuracy and MACs", xlabel="epoch", ylim=(0, 1.05), xticks=epochs)
    left.legend()
    right.plot(epochs, [row["theta"] for row in aap], "o-")
    right.set(title="AAP: learned threshold θ", xlabel="epoch", xticks=epochs)
    _save(figure, "dance-aap.png")


def _curves(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        raise DanceError(f"{path} is missing: run `python benchmarks/dance.py train` first")
    with path.open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


# ---- accuracy and MACs ----


@app.command()
def accuracy(runs: Runs = Path("runs/dance"), threads: Threads = 2) -> None:
    """Every run of the recipe that is there, on the same held-out clips."""
    torch.set_num_threads(threads)
    rows = []
    for name, (method, *_) in RECIPE.items():
        path = runs / name.replace(" ", "-") / training.MODEL
        if not path.exists():
            continue
        network, card = _network(path, method)
        correct, executed, dense, kept = _evaluate(network, MotionDigits(HELD_OUT, held_out=True))
        share = executed / dense
        label = {"frames": "AAP, frames alone", "channels": "AAP, channels alone", "positions": "AAP, positions alone"}
        rows.append([
            label.get(name, {"dense": "dense", "ava": "AVA", "aap": "AAP (ships)"}.get(name, "AAP without AVA")),
            f"{100 * correct.mean():.1f} %",
            f"{executed.mean() / 1e6:.1f} M",
            f"{1 / share.mean():.2f}x",
            f"{share.min():.2f} … {share.max():.2f}",
            *(f"{value:.2f}" if value is not None else "–" for value in kept),
            f"{card['theta']:.3f}" if "theta" in card else "–",
        ])  # fmt: skip
    head = ("network", "accuracy", "MACs, mean", "fewer", "share by clip", "frames", "channels", "positions", "θ")
    _write_section("accuracy", _table(head, rows))


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
    for batch, labels in DataLoader(clips, 32):  # type: ignore[arg-type]
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
def latency(
    work: Annotated[Path, typer.Option(help="folder for the artifacts")] = Path("artifacts"),
    clips: Annotated[int, typer.Option(min=2, help="clips whose outputs and MACs are compared")] = 64,
    timed: Annotated[int, typer.Option(min=2, help="clips that are timed")] = 10,
    model: Annotated[Path | None, typer.Option(help="a model.safetensors of --method aap")] = None,
    keep: Annotated[float | None, typer.Option(help="random masks that keep this share of each axis instead")] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="take the artifacts that an earlier run left in --work")
    ] = False,
    threads: Threads = 2,
) -> None:
    """The pruned network and its dense twin, built for this machine."""
    from dance_tvm.artifact import load_artifact
    from dance_tvm.benchmarking.measure import Contender, in_turns
    from dance_tvm.compiler import build_network
    from dance_tvm.device import open_device

    torch.set_num_threads(threads)
    network, card = _random(keep) if keep else trained.load(model or trained.SHIPPED)
    twin = trained.dense(card)
    own = network.state_dict()
    twin.load_state_dict({name: own[name] for name in twin.state_dict()})
    example = (torch.zeros(1, *card["clip_shape"]),)
    built = [
        load_artifact(work / name)
        if reuse
        else build_network(torch.export.export(each.eval(), example), work / name, threads=threads).artifact
        for name, each in (("dance-pruned", network), ("dance-dense", twin))
    ]
    held_out = MotionDigits(max(clips, timed), held_out=True)
    with open_device("local") as device:
        pruned, dense = (device.load(artifact) for artifact in built)
        name = built[0].manifest.inputs[0].name
        _write_section("exactness", _exactness(network, pruned, name, [held_out[i][0] for i in range(clips)]))
        rows, pairs = [], []
        all_macs = MacCounter(network).count([], 1).dense  # type: ignore[arg-type]
        for index in range(timed):
            clip = {name: held_out[index][0][None].numpy()}
            both = Contender(pruned, clip), Contender(dense, clip)
            in_turns(both, runs=5, seconds=0.3)
            seconds = [float(np.median(each.seconds)) for each in both]
            executed = _conv_macs(pruned.kernels(clip, repeats=0))
            faster, fewer = seconds[1] / seconds[0], all_macs / executed
            pairs.append((faster, fewer, *seconds))
            motion = f"{held_out.classes[held_out.label(index)]}, {held_out.difficulty(index):.2f}"
            rows.append([
                str(index), motion, f"{1e3 * seconds[1]:.2f}", f"{1e3 * seconds[0]:.2f}",
                f"{faster:.2f}", f"{fewer:.2f}", f"{faster / fewer:.2f}",
            ])  # fmt: skip
        head = ("clip", "motion, difficulty", "dense ms", "pruned ms", "faster", "fewer MACs", "faster ÷ fewer")
        _write_section("latency", _table(head, rows))
        clip = {name: held_out[0][0][None].numpy()}
        _write_section("layers", _by_layer(pruned.kernels(clip, 9), dense.kernels(clip, 9)))
    _latency_picture(pairs)


def _random(keep: float) -> tuple[nn.Module, dict[str, Any]]:
    """The recipe's network with random masks: enough for exactness and speed, which no training changes."""
    card = {"settings": {"model": MODEL}, "classes": MOTIONS, "clip_shape": [1, 16, 32, 32]}
    clips = MotionDigits(32)
    seen = torch.stack([clips[index][0] for index in range(32)])
    torch.manual_seed(0)
    return keep_at_random(prune(trained.dense(card), (1, 16, 32, 32)), seen, keep), card


def _exactness(network: nn.Module, compiled: Any, name: str, clips: Sequence[Tensor]) -> str:
    """Compares logits and MACs of the compiled network with the masked PyTorch network's, clip by clip."""
    counter = MacCounter(network)  # type: ignore[arg-type]
    largest, scale, same_macs, same_class = 0.0, 0.0, 0, 0
    for clip in clips:
        with torch.no_grad():
            expected = network(clip[None]).numpy()
        found = next(iter(compiled.run({name: clip[None].numpy()}).values()))
        count = counter.count(controller_of(network).decisions, 1)
        executed = _conv_macs(compiled.kernels({name: clip[None].numpy()}, repeats=0))
        largest, scale = max(largest, float(np.abs(found - expected).max())), max(scale, float(np.abs(expected).max()))
        same_macs += executed == int(count.executed[0])
        same_class += int(found.argmax() == expected.argmax())
    return (
        f"On {len(clips)} held-out clips the largest difference of a logit, relative to the largest of all, is "
        f"{largest / scale:.1e}; {same_class} of {len(clips)} have the same class; on {same_macs} of {len(clips)} "
        "the MACs counted by `MacCounter` equal those on the kernels' index lists exactly, the controller's included."
    )


def _conv_macs(kernels: Iterable[Any]) -> int:
    return sum(call.work["macs"] or 0 for call in kernels if call.work)


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


def _latency_picture(pairs: Sequence[tuple[float, ...]]) -> None:
    plot = _pyplot()
    figure, axes = plot.subplots(figsize=(7, 3))
    places = np.arange(len(pairs))
    axes.bar(places - 0.2, [1e3 * pair[3] for pair in pairs], 0.4, label="dense")
    axes.bar(places + 0.2, [1e3 * pair[2] for pair in pairs], 0.4, label="pruned")
    axes.set(xlabel="held-out clip", ylabel="ms", xticks=places)
    axes.legend()
    _save(figure, "dance-latency.png")


# ---- TransNetV2 ----


@app.command()
def transnet(
    runs: Runs = Path("runs/dance"),
    budgets: Annotated[str, typer.Option(help="shares of the dense MACs, comma-separated")] = "0.75,0.5",
    clips: Annotated[str, typer.Option(help="videos joined by '+'")] = "published",
    epochs: int = 3,
    window: int = 100,
    most: Annotated[int, typer.Option(help="training windows an epoch")] = 64,
    threads: Threads = 2,
) -> None:
    """The published network as its own teacher, on frames it shares with no held-out window."""
    rows = []
    for budget in (float(part) for part in budgets.split(",")):
        out = runs / f"transnet-{budget:g}-{window}"
        if (out / training.MODEL).exists():
            metrics = checkpoint.read_checkpoint(out / training.MODEL)[1]["metrics"]
        else:
            result = train.run(
                method="aap", model="transnetv2", data=f"transnet:{clips},window={window},most={most}", out=out,
                resume=(out / training.CHECKPOINT).exists(), epochs=epochs, batch=2, lr=2e-4, threads=threads,
                options={"target_macs": budget, "ramp": 0.5, "controller_rate": 10.0}, console=typer_console(),
            )  # fmt: skip
            metrics = result.metrics
        rows.append([
            f"{budget:g}", f"{metrics['share']:.3f}", f"{1 / metrics['share']:.2f}x", f"{metrics['f1']:.3f}",
            f"{metrics['agreement']:.4f}", f"{metrics['difference']:.3f}",
        ])  # fmt: skip
    head = ("target", "share of MACs", "fewer", "F1", "frames agreeing", "largest difference, mean over windows")
    _write_section("transnet", _table(head, rows))


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
        raise DanceError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(PICTURES / name, dpi=110)
    print(f"wrote {PICTURES / name}")


if __name__ == "__main__":
    from dance_tvm.cli import start

    start(app, "benchmarks/dance.py")
