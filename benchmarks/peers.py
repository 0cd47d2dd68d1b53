"""Ours against PyTorch, inductor, ONNX Runtime, OpenVINO and MNN: fp32, batch 1, whole networks and single layers.

    python -m benchmarks.peers                        networks on 1 and 2 threads
    python -m benchmarks.peers --layers               the layers of C3D and R(2+1)D-18 singly
    python -m benchmarks.peers --quick                two small networks, in about a minute
    python -m benchmarks.peers --only c3d --peers ours,openvino --threads 2

Every engine lives in its own process (``engines.py``). They are asked in turns, each round in another order, one at a
time: noise hits all alike, and ratios are taken within a round. Outputs are compared with PyTorch in float64.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks.engines import ENGINES, PEERS, Case, export_case, measure
from benchmarks.runs import table, write_runs
from dance_tvm.core.errors import DanceError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

NETWORKS = ("c3d", "r2plus1d-18", "s3d", "transnetv2")
QUICK_NETWORKS = ("c3d-mini", "r2plus1d-mini")
LAYERED = ("c3d", "r2plus1d-18")


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


# --- the command ---


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
    if unknown := [peer for peer in chosen if peer not in ENGINES]:
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
