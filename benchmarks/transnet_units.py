"""TransNetV2 pruned in units, without labels: F1 of its boundaries against the speed-up that is measured.

    python -m benchmarks.transnet_units train --budgets 0.8,0.65,0.5
    python -m benchmarks.transnet_units curve

``train`` prunes channels in the units that this machine's kernels can leave out (`dance-tvm units`), to each share of
the multiply-adds; ``curve`` builds what was trained and the published network, each as the build chooses its kernels,
and times them in turns on the held-out windows: processor time of one thread. F1 is that of the boundaries which the
published network finds there. The figures go to benchmarks/results/transnet_units.json, the picture to docs/images.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import numpy as np
import typer
from torch import nn

from dance_tvm import Options, build_network, load_artifact, models, open_device
from dance_tvm.machines.host import _cpuinfo
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dance.method import controller_of
from dance_tvm.sparsity.tasks import Logits
from dance_tvm.sparsity.training import MODEL

from .agreement import Agreement, Judge, pruned_transnet

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "benchmarks/results/transnet_units.json", ROOT / "docs/images/transnet-units.png"
#: Windows of all frames that the network takes: its file of units is of these.
DATA = "transnet:published,window=100"
#: As `benchmarks.dance transnet` found them: ranked on 16 windows, fitted on 24, and small steps after.
SETTINGS = {
    "axes": "channels", "start": 16, "refit": 24, "hint": 0.3, "ramp": 0, "distill": 0, "backbone_rate": 1,
}  # fmt: skip
Runs = Annotated[Path, typer.Option(help="folder of the training runs and artifacts")]
Budgets = Annotated[str, typer.Option(help="shares of the dense multiply-adds, joined by commas")]
CALLS = 3  # whose processor time is taken together
RUNS, BUDGETS = Path("runs/transnet-units"), "0.8,0.65,0.5"


@app.command("train")
def train(runs: Runs = RUNS, budgets: Budgets = BUDGETS, steps: int = 48) -> None:
    """Train what is not there yet."""
    runs.mkdir(parents=True, exist_ok=True)
    units, command = runs / "units.json", [sys.executable, "-m", "dance_tvm"]
    if not units.exists():
        words = ["--model", "transnetv2", "--threads", "1", "--out", str(units)]
        subprocess.run([*command, "units", *words], check=True)
    settings = [word for key, value in {**SETTINGS, "units": units}.items() for word in ("--set", f"{key}={value}")]
    for budget in budgets.split(","):
        out = runs / budget
        if (out / MODEL).exists():
            continue
        words = ["--method", "aap", "--model", "transnetv2", "--data", f"{DATA},most={steps}", "--epochs", "1"]
        words += ["--batch", "1", "--lr", "6e-6", "--target-macs", budget, "--threads", "1", "--no-export"]
        subprocess.run([*command, "train", *words, *settings, "--out", str(out)], check=True)


@app.command("curve")
def curve(runs: Runs = RUNS, budgets: Budgets = BUDGETS, rounds: int = 3) -> None:
    """Compare what was trained with the published network, in turns."""
    judge = Judge(DATA)
    dense = _built(Logits(models.pretrained("transnetv2")), runs / "dense-artifact", judge)
    rows = []
    for budget in budgets.split(","):
        network, _ = pruned_transnet(runs / budget / MODEL)
        counter, shares = MacCounter(network), []

        def note(network: nn.Module = network, counter: MacCounter = counter, shares: list[float] = shares) -> None:
            count = counter.count(controller_of(network).decisions, 1)
            shares.append(float(count.executed.mean() / count.dense))

        agreement = judge(network, note)
        times = _in_turns([dense, _built(network, runs / f"{budget}-artifact", judge)], judge, rounds)
        rows.append(_row(budget, float(np.mean(shares)), agreement, *times))
        print(json.dumps(rows[-1]), flush=True)
    facts = {"machine": _cpuinfo("model name"), "threads": 1, "windows": len(judge.windows), "frames": judge.frames}
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    _draw(rows)


def _row(budget: str, share: float, agreement: Agreement, dense: np.ndarray, pruned: np.ndarray) -> dict[str, Any]:
    """Speed-ups by window, and what they are the median of: both (windows,) in seconds of processor time."""
    by_window = dense / pruned
    low, middle, high = (float(np.percentile(by_window, each)) for each in (2.5, 50, 97.5))
    return {
        "budget": float(budget), "share_of_macs": share, "f1": agreement.f1, "found": agreement.found,
        "boundaries": agreement.boundaries, "extra": agreement.extra, "largest_difference": agreement.largest,
        "dense_ms": 1e3 * float(np.median(dense)), "pruned_ms": 1e3 * float(np.median(pruned)),
        "speed_up": middle, "speed_up_2.5": low, "speed_up_97.5": high,
    }  # fmt: skip


def _built(network: nn.Module, out: Path, judge: Judge) -> Path:
    """The artifact of ``network`` for one thread of this machine."""
    inputs = (judge.windows[:1],)
    build_network(network.eval(), out, target="host", example_inputs=inputs, options=Options(threads=1))
    return out


def _in_turns(artifacts: list[Path], judge: Judge, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Least processor seconds of each window by each artifact: two of (windows,)."""
    least = np.full((len(artifacts), len(judge.windows)), np.inf)
    with open_device("local") as device:
        networks = [device.load(load_artifact(path)) for path in artifacts]
        for _ in range(rounds):
            for at, window in enumerate(judge.windows):
                for which, network in enumerate(networks):
                    given = {network.manifest.inputs[0].name: window[None].numpy()}
                    network.time(given, 1)
                    before = process_time()
                    network.time(given, CALLS)
                    least[which, at] = min(least[which, at], (process_time() - before) / CALLS)
    return least[0], least[1]


def _draw(rows: list[dict[str, Any]]) -> None:
    """F1 against speed-up, and the reduction of multiply-adds beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.8))
    points = sorted(rows, key=lambda row: -row["share_of_macs"])
    scores = [1.0, *(row["f1"] for row in points)]
    axis.plot([1.0, *(row["speed_up"] for row in points)], scores, "o-", label="measured speed-up")
    axis.plot([1.0, *(1 / row["share_of_macs"] for row in points)], scores, "s--", label="fewer multiply-adds")
    axis.set_xlabel("times the published network's dense build (one thread)")
    axis.set_ylabel("F1 of its boundaries, held-out frames")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    app()
