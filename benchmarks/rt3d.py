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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dance_tvm import train
from dance_tvm.errors import DanceError
from dance_tvm.sparsity.training import CARD, MODEL

app = typer.Typer(add_completion=False, rich_markup_mode=None)
PAGE = Path(__file__).parent.parent / "docs" / "rt3d.md"

DATA = "motion-digits,train=480,test=384,size=24,frames=8"
DENSE_EPOCHS = 12
EPOCHS = 6
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
    options = {"algorithm": case.algorithm, "scheme": case.scheme, "rate": case.rate, "dense": 0.0, "retrain": 0.5}
    return trained(
        runs / case.folder, method="kgs", model=case.model, data=DATA, epochs=EPOCHS, lr=6e-4, options=options,
        init=runs / case.model / "dense" / MODEL,
    )  # fmt: skip


@app.command()
def table1(
    runs: Annotated[Path, typer.Option(help="where training runs are kept")] = Path("build/rt3d"),
    model: Annotated[list[str] | None, typer.Option(help="c3d-mini, r2plus1d-mini")] = None,
    write: Annotated[bool, typer.Option(help="write the page; off to train one model beside another process")] = True,
) -> None:
    """Train every case that is missing and write Table 1."""
    chosen = model or list(HIGH_RATE)
    rows = []
    for name in chosen:
        base = train_dense(runs, name)
        for case in table1_cases(name):
            card = train_case(runs, case)
            print(case, f"{card['metrics']['accuracy']:.1%}", flush=True)
            rows.append(_row(case, card, base))
    if write:
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
