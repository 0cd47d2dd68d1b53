"""docs/networks.md from the results.

python -m benchmarks.published.page
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.networks import MEASURED
from benchmarks.published.networks import NETWORKS, Network

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/published.json"
TIMES = ROOT / "benchmarks/results/networks.json"
FAMILIES = ROOT / "benchmarks/results/families.json"
PAGE = ROOT / "docs/networks.md"

_INTRODUCTION = """\
# Published networks

Video and volumetric networks that others have published. Each, with random weights, is exported, imported, built for
this machine with the default options, run, and compared with PyTorch in float64. **Error**: the largest difference as
a share of the output's largest value, at most 1e-4 to count as right; next to it, PyTorch's own error in float32.

```console
$ pip install --no-deps -r benchmarks/published/requirements.txt
$ python -m benchmarks.published [--only NAME] [--source pt2|onnx] [--json FILE]
```

The wheels in that list are installed without their dependencies, so that they fit the pinned PyTorch. Networks that no
wheel contains are defined in `benchmarks/published`. Input sizes are the networks' usual ones, or smaller where the
table gives the usual one in brackets: the architecture is complete, and only fewer positions and frames are computed.
ONNX files are written by PyTorch's exporter, or by its older one where that refuses. A run continues where the last
one stopped.
"""


_TIMES = """
## How fast

`python -m benchmarks.networks` runs the engines in turns, each in a process of its own, in float32. Other work was
running on the machine at the time, so wall-clock times would not be latencies: **ms** is the least processor time of a
call (all threads of the engine), **ratio** is ours divided by that of the fastest other engine, and **in turns** is
the median of the ratios of wall times within a round, with its 95 % interval. Rows without a date are from before that
least was recorded, and have the least of the turns' means instead: the same where a call takes more than some 35 ms,
which makes a turn by itself, and a few per cent more for all engines where calls are shorter. `python -m
benchmarks.networks --profile NAME` shows what a call of ours is spent on. What has no row here, with two threads or
beside MNN (whose column is then empty), has not been measured yet. Each machine has a table of its own.
"""

_TIMES_TABLE = """
{machine}.

| network | input | threads | GMAC | ours, ms | {peers} | ratio | in turns, to the same | error | measured |
|---|---|---|---|---|{rule}---|---|---|---|"""

_FAMILIES = """
## Families of layers

`python -m benchmarks.families`: a few layers of one kind, so that the layout changes at both ends, where tensors have
channels first, weigh more than in a whole network. **ms** and **ratio** as above, compared with the faster of the two.

{machine}

| family | threads | GMAC | ours, ms | {peers} | ratio | error |
|---|---|---|---|{rule}---|---|"""

Rows = list[tuple[Network, dict[str, Any]]]


def write_page(results: dict[str, Any]) -> None:
    """Write the page."""
    rows = [(network, results[network.name]) for network in NETWORKS if network.name in results]
    measured = times(json.loads(TIMES.read_text(encoding="utf-8"))) if TIMES.exists() else ()
    layers = families(json.loads(FAMILIES.read_text(encoding="utf-8"))) if FAMILIES.exists() else ()
    told = [*_counted(rows), "", *_table(rows), *_others(rows)]
    lines = [_INTRODUCTION, *told, *measured, *layers, *_recipes(rows)]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _counted(rows: Rows) -> Iterator[str]:
    for source, name in (("pt2", ".pt2"), ("onnx", "ONNX")):
        tried = [result[source] for _, result in rows if source in result]
        right = sum(one["status"] == "right" for one in tried)
        yield f"- From {name}: {right} of the {len(tried)} tried so far are built and right."


def _table(rows: Rows) -> Iterator[str]:
    yield "Processor seconds and peak memory are those of the whole build from .pt2, import and check included."
    yield ""
    yield (
        "| network | input (usual) | weights, M | PyTorch float32 | from .pt2 | from ONNX | build, CPU s | peak, MB | "
        "artifact, MB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for network, result in rows:
        shape = network.shapes + (f" ({network.usual})" if network.usual else "")
        built = next((result[source] for source in ("pt2", "onnx") if "peak_mb" in result.get(source, {})), {})
        cells = [
            *(network.name, shape, f"{result.get('parameters', 0) / 1e6:.1f}", f"{result.get('float32_error', 0):.0e}"),
            *(_error(result.get(source)) for source in ("pt2", "onnx")),
            *(f"{built[key]:.0f}" if key in built else "" for key in ("cpu_s", "peak_mb", "artifact_mb")),
        ]
        yield f"| {' | '.join(cells)} |"


def _error(one: dict[str, Any] | None) -> str:
    if one is None:
        return "not tried"
    return f"{one['error']:.0e}" if one["status"] == "right" else one["status"]


def _others(rows: Rows) -> Iterator[str]:
    told = [
        f"- {network.name} from {source}: {result[source]['status']}: {' '.join(result[source]['message'].split())}"
        for network, result in rows
        for source in ("pt2", "onnx")
        if result.get(source, {}).get("status", "right") != "right"
    ]
    if told:
        yield from ("", "## What is not right", "", *told)


def times(measured: dict[str, Any]) -> Iterator[str]:
    """The section of what ``benchmarks.networks`` measured."""
    yield _TIMES.rstrip()
    machines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in measured["runs"]:
        if "ms" in run["peers"]["ours"]:
            machines[_machine(run if "machine" in run else measured)].append(run)
    for about, runs in machines.items():
        yield from _times_table(about, runs)


def _times_table(about: str, runs: list[dict[str, Any]]) -> Iterator[str]:
    """What was measured on one machine."""
    peers = [peer for peer in dict.fromkeys(peer for run in runs for peer in run["peers"]) if peer != "ours"]
    yield _TIMES_TABLE.format(
        machine=about, peers=" | ".join(f"{peer}, ms" for peer in peers), rule="---|" * len(peers)
    )
    shapes = {network.name: network.shapes for network in NETWORKS}
    inputs = {entry.name: entry.shapes or shapes.get(entry.published, "the zoo's") for entry in MEASURED}
    ratios: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        ours, others = run["peers"]["ours"], {peer: run["peers"].get(peer, {}) for peer in peers}
        able = {peer: result for peer, result in others.items() if "least_processor_ratio" in result}
        fastest = max(able, key=lambda peer: able[peer]["least_processor_ratio"], default="")
        cells = [run["case"], inputs.get(run["case"], ""), str(run["threads"]), f"{run['gmacs']:.2f}"]
        cells.append(f"{ours['least_processor_ms']:.1f}")
        cells += [f"{able[peer]['least_processor_ms']:.1f}" if peer in able else "–" for peer in peers]
        if fastest:
            best = able[fastest]
            low, high = best["ratio_interval"]
            ratio = best["least_processor_ratio"]
            ratios[run["threads"]].append(ratio)
            cells += [f"{ratio:.2f} ({fastest})", f"{best['ours_over_it']:.2f} ({low:.2f} to {high:.2f})"]
        else:
            cells += ["–", "–"]
        cells += [f"{ours['error']:.0e}", run.get("date", "–")]
        yield f"| {' | '.join(cells)} |"
    for threads, each in ratios.items():
        mean = math.exp(sum(map(math.log, each)) / len(each))
        yield from ("", f"Geometric mean of the ratios, {threads} thread{'s' * (threads > 1)}: {mean:.2f}.")


def _machine(measured: dict[str, Any]) -> str:
    about = measured["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['processor']} ({about['cores']} cores), {versions}"


def families(measured: dict[str, Any]) -> Iterator[str]:
    """The section of what ``benchmarks.families`` measured."""
    here = measured["machine"]["processor"]
    every = [run for run in measured["runs"] if run.get("machine", measured["machine"])["processor"] == here]
    runs = [run for run in every if "ms" in run["peers"]["ours"]]
    peers = [peer for peer in dict.fromkeys(peer for run in runs for peer in run["peers"]) if peer != "ours"]
    about = f"{_machine(measured)}, {measured['time'][:10]}."
    yield _FAMILIES.format(machine=about, peers=" | ".join(f"{peer}, ms" for peer in peers), rule="---|" * len(peers))
    ratios = []
    for run in runs:
        ours, able = run["peers"]["ours"], {peer: run["peers"].get(peer, {}) for peer in peers}
        found = [result["least_processor_ratio"] for result in able.values() if "least_processor_ratio" in result]
        cells = [run["case"], str(run["threads"]), f"{run['gmacs']:.2f}", f"{ours['least_processor_ms']:.2f}"]
        cells += [f"{one['least_processor_ms']:.2f}" if "ms" in one else "–" for one in able.values()]
        cells += [f"{max(found):.2f}" if found else "–", f"{ours['error']:.0e}"]
        ratios += [max(found)] if found else []
        yield f"| {' | '.join(cells)} |"
    mean = math.exp(sum(map(math.log, ratios)) / max(1, len(ratios)))
    least = sum(ratio <= 1 for ratio in ratios)
    yield from ("", f"At most 1.0 in {least} of {len(ratios)} families; geometric mean {mean:.2f}.")


def _recipes(rows: Rows) -> Iterator[str]:
    yield from ("", "## How each is made", "", "| network | module | call |", "|---|---|---|")
    for network, _ in rows:
        yield f"| {network.name} | `{network.module}` | `{network.call}` |"


if __name__ == "__main__":
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
