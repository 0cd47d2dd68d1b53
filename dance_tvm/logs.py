"""``dance-tvm logs``: check, merge and show tuning logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.core.cli import application, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.options import AsJson
from dance_tvm.schedules.cpu.spaces import SPACES
from dance_tvm.schedules.workload import GATHER, KERNEL_GROUPS, POOL, WINOGRAD, Workload
from dance_tvm.tuning.records import LOGS, Log, Record, parse_loosely, rewrite

app = application(help="Check, merge and show tuning logs.")

Files = Annotated[list[Path] | None, typer.Argument(help="Logs; all of the package's own unless given.")]


@app.command()
def check(files: Files = None) -> None:
    """Parse every line; name each that is not a whole record of ours. Exit code 1 where there is one."""
    bad = 0
    for path in _files(files):
        log = Log.read(path)
        whole = sum(1 for _ in log.records())
        for number, reason in sorted(log.problems):
            typer.echo(f"{path}, line {number}: {reason}")
        bad += len(log.problems)
        typer.echo(f"{path}: {whole} records in {log.lines} lines")
    raise typer.Exit(1 if bad else 0)


@app.command()
def merge(
    into: Annotated[Path, typer.Argument(help="The log to write; what it holds already is merged too.")],
    files: Annotated[list[Path], typer.Argument(help="Logs to merge.")],
    best: Annotated[bool, typer.Option("--best", help="Keep the newest verified record of each layer alone.")] = False,
) -> None:
    """Merge logs into one: whole records, each once, in the order of their dates."""
    records: dict[bytes, Record] = {}
    for path in [into, *files]:
        if path != into and not path.exists():
            raise DanceError(f"there is no log {path}")
        for raw in path.read_bytes().split(b"\n") if path.exists() else []:
            record = parse_loosely(raw)
            if record is not None:
                records[record.line()] = record
    kept = sorted(records.values(), key=lambda record: record.date)
    if best:
        newest = {(record.fingerprint, record.workload_id): record for record in kept if record.status == "verified"}
        kept = list(newest.values())
    rewrite(into, kept)
    typer.echo(f"{into}: {len(kept)} records")


@app.command()
def best(files: Files = None, as_json: AsJson = False) -> None:
    """The verified record of every layer, as builds use it."""
    found = []
    for path in _files(files):
        log = Log.read(path)
        found += [record for fingerprint in sorted(log.fingerprints) for record in log.best(fingerprint).values()]
    if as_json:
        typer.echo(json.dumps([record.model_dump() for record in found], indent=2))
    else:
        _print(found)


@app.command()
def show(
    files: Files = None,
    layer: Annotated[str, typer.Option(help="Only the workload with this identity.")] = "",
    last: Annotated[int, typer.Option(help="How many records to show.", min=1)] = 40,
) -> None:
    """The latest records, trials and failures too."""
    found = [record for path in _files(files) for record in Log.read(path).records(workload=layer or None)]
    _print(found[-last:])


def _files(files: list[Path] | None) -> list[Path]:
    for path in files or []:
        if not path.is_file():
            raise DanceError(f"there is no log {path}: `dance-tvm tune` writes them to {LOGS}")
    found = files or sorted(path for family in SPACES for path in LOGS.glob(f"*.{family}.jsonl"))
    if not found:
        raise DanceError(f"there are no tuning logs in {LOGS}: `dance-tvm tune` writes them")
    return found


#: What the description of a kernel adds for its family.
_KINDS: dict[str, Callable[[Workload], str]] = {
    GATHER: lambda work: "",
    WINOGRAD: lambda work: " winograd",
    KERNEL_GROUPS: lambda work: f" groups {work.group[0]}x{work.group[1]}, {work.kept:.0%} kept",
    POOL: lambda work: f" {work.pooling} pool",
}


def _print(records: list[Record]) -> None:
    table = Table("workload", "kernel", "density", "status", "ms", "spread", "default", "tile", "origin", "date")
    for record in records:
        work = record.shape
        kernel, out = ("x".join(map(str, extents)) for extents in (work.window.kernel, work.window.out))
        shape = f"{work.channels_in}>{work.channels_out} {kernel}{_KINDS[work.family](work)} @ {out}"
        tile = " ".join(f"{name}={value}" for name, value in record.decisions.items())
        scale = 1e3 if record.unit == "seconds" else 1e-6
        default = f"{scale * record.default_seconds:.3f}" if record.default_seconds else ""
        time = f"{scale * record.seconds:.3f}" if record.seconds else record.error
        origin = record.origin if record.unit == "seconds" else f"{record.origin} (millions of {record.unit})"
        table.add_row(
            record.workload_id, shape, f"{work.density:g}", record.status, time, f"{record.spread:.0%}", default,
            tile, origin, record.date[:10],
        )  # fmt: skip
    Console(width=200).print(table)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.logs")
