"""Is a network as fast as another commit built it? Both checkouts build it, and their calls are timed in turns.

    git worktree add --detach ../before COMMIT
    python -m benchmarks.since build ../before --network c3d        once; `--into` keeps the artifacts
    python -m benchmarks.since measure ../before --network c3d

Each checkout runs in a process of its own, since neither has to read the other's artifacts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

HERE = Path(__file__).parent.parent
NETWORKS = ("dance-c3d-mini", "c3d", "transnetv2")
Checkout = Annotated[
    Path, typer.Argument(help="a checkout of the commit to compare with", exists=True, file_okay=False)
]
Networks = Annotated[list[str] | None, typer.Option("--network", help=f"default: {', '.join(NETWORKS)}")]
Into = Annotated[Path, typer.Option(help="where artifacts are kept")]

app = typer.Typer(add_completion=False, rich_markup_mode=None)

#: What either checkout runs: loads an artifact, then tells for each line that it reads the seconds of so many calls.
#: Commands moved within the package; the oldest offer these two functions in modules alone.
CHILD = """
import json, sys, time
import numpy as np
try:
    from dance_tvm import load_artifact, open_device
except ImportError:
    from dance_tvm.artifact import load_artifact
    from dance_tvm.device import open_device
network = open_device("local").load(load_artifact(sys.argv[1]))
feed = dict(np.load(sys.argv[2]))
network.run(feed)
for line in sys.stdin:
    before = time.process_time()
    clock = network.time(feed, int(line))
    spent = (time.process_time() - before) / int(line)
    print(json.dumps([min(clock), spent]), flush=True)
"""


#: The command line of either checkout.
COMMAND = """
try:
    from dance_tvm.core.cli import main
except ImportError:
    from dance_tvm.cli import main
main()
"""


def _environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout.resolve())}


def _sides(before: Path) -> dict[str, Path]:
    return {"before": before, "now": HERE}


def _turn(child: subprocess.Popen[str], calls: int) -> tuple[float, float]:
    """Least seconds of a call by the clock, and their mean of processor time."""
    assert child.stdin
    assert child.stdout
    child.stdin.write(f"{calls}\n")
    child.stdin.flush()
    least, spent = json.loads(child.stdout.readline())
    return least, spent


@app.command()
def build(before: Checkout, network: Networks = None, into: Into = Path("build/since"), threads: int = 1) -> None:
    """Build each network by both checkouts, unchecked."""
    for name in network or NETWORKS:
        for side, checkout in _sides(before).items():
            out = ["--out", str((into / f"{name}-{threads}" / side).resolve()), "--threads", str(threads), "--no-check"]
            command = [sys.executable, "-c", COMMAND, "build", "--model", name, *out]
            subprocess.run(command, env=_environment(checkout), cwd=checkout, check=True)


@app.command()
def measure(
    before: Checkout,
    network: Networks = None,
    into: Into = Path("build/since"),
    threads: int = 1,
    rounds: Annotated[int, typer.Option(min=2, help="turns of each")] = 15,
    seconds: Annotated[float, typer.Option(help="how long a turn takes, about")] = 0.5,
) -> None:
    """Time both builds of each network in turns: least and median of the clock, least processor time."""
    for name in network or NETWORKS:
        found = _measured(_sides(before), into / f"{name}-{threads}", rounds, seconds)
        ratio = {what: found["now"][what] / found["before"][what] for what in found["now"]}
        shown = {side: {what: f"{1e3 * took:.3f} ms" for what, took in times.items()} for side, times in found.items()}
        print(json.dumps({"network": name, "threads": threads, **shown, "now / before": ratio}), flush=True)


def _random_input(manifest: Path, into: Path) -> None:
    """Write an input for every tensor that the artifact takes: bytes, or floats from 0 to 1."""
    drawn, given = np.random.default_rng(0), {}
    for tensor in json.loads(manifest.read_text(encoding="utf-8"))["inputs"]:
        values = drawn.random(tensor["shape"])
        given[tensor["name"]] = (255 * values if tensor["dtype"] == "uint8" else values).astype(tensor["dtype"])
    np.savez(into, **given)


def _measured(sides: dict[str, Path], folder: Path, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Of each side, seconds of a call: the least and the median of its turns' least, and the least processor time."""
    feed = folder / "input.npz"
    _random_input(folder / "now" / "manifest.json", feed)
    with ExitStack() as stack:
        running = {}
        for side, checkout in sides.items():
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD, str((folder / side).resolve()), str(feed.resolve())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(checkout), cwd=checkout,
            )  # fmt: skip
            stack.callback(child.terminate)
            running[side] = child
        turns: dict[str, list[tuple[float, float]]] = {side: [_turn(child, 1)] for side, child in running.items()}
        calls = {side: max(1, round(seconds / took[0][0])) for side, took in turns.items()}
        for _ in range(rounds):
            for side, child in running.items():
                turns[side].append(_turn(child, calls[side]))
    return {
        side: {
            "least": min(clock for clock, _ in took),
            "median": median(clock for clock, _ in took[1:]),
            "processor": min(spent for _, spent in took),
        }
        for side, took in turns.items()
    }


if __name__ == "__main__":
    app()
