"""``dance-tvm logs``: check, merge and show tuning logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_writable
from dance_tvm.core.options import AsJson
from dance_tvm.core.printing import counted, print_table

if TYPE_CHECKING:
    from dance_tvm.records.kernel_log import Log, Record
    from dance_tvm.schedules.workload import Workload

app = application(help="Check, merge and show tuning logs.", no_args_is_help=True)

Files = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Logs, or folders of them.", show_default="all of ./tuning_logs or your own, and the package's"
    ),
]


@app.command(
    epilog=examples(
        "dance-tvm logs check",
        "dance-tvm logs check tuning_logs/*.jsonl",
    )
)
def check(files: Files = None, as_json: AsJson = False) -> None:
    """Parse every line; name each that is not a whole record of ours. Exit code 1 where there is one."""
    from dance_tvm.records.kernel_log import Log

    found: list[dict[str, Any]] = []
    for path in _files(files):
        log = Log.read(path)
        whole = sum(1 for _ in log.records())
        problems = [{"line": number, "reason": reason} for number, reason in sorted(log.problems)]
        found.append({"log": str(path), "records": whole, "lines": log.lines, "problems": problems})
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for one in found:
            for problem in one["problems"]:
                typer.echo(f"{one['log']}, line {problem['line']}: {problem['reason']}")
            typer.echo(f"{one['log']}: {counted(one['records'], 'record')} in {counted(one['lines'], 'line')}")
    raise typer.Exit(1 if any(one["problems"] for one in found) else 0)


@app.command(
    epilog=examples(
        "dance-tvm logs merge tuning_logs/snapdragon.conv3d_gather.jsonl from-the-lab.jsonl",
        "dance-tvm logs merge --best short.jsonl long.jsonl",
    )
)
def merge(
    into: Annotated[Path, typer.Argument(help="The log to write; records already in it are merged too.")],
    files: Annotated[list[Path], typer.Argument(help="Logs to merge.")],
    best: Annotated[bool, typer.Option("--best", help="Keep only the newest verified record of each layer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge logs into one: whole records, each once, in the order of their dates. Other lines are named."""
    from dance_tvm.records.kernel_log import rewrite

    skipped: list[dict[str, str | int]] = []
    kept: list[Record] = []

    def merged(standing: bytes) -> list[Record]:
        records: dict[bytes, Record] = {}
        for path, content in [(into, standing), *((path, path.read_bytes()) for path in files if path != into)]:
            for number, found in _parsed(content):
                if isinstance(found, str):
                    skipped.append({"log": str(path), "line": number, "reason": found})
                else:
                    records[found.line()] = found
            if path == into and content.strip() and not records:
                raise DanceError(f"{into} is there and has no record: name the log to write first, then what to merge")
        kept.extend(sorted(records.values(), key=lambda record: record.date))
        if best:
            verified = (record for record in kept if record.status == "verified" and record.steady)
            kept[:] = {(record.fingerprint, record.workload_id): record for record in verified}.values()
        return kept

    for path in files:
        if not path.is_file():
            raise DanceError(f"there is no log {path}")
    require_writable(into, "INTO")
    rewrite(into, merged)
    for line in skipped:
        print(f"{line['log']}, line {line['line']}: {line['reason']}; left out", file=sys.stderr)
    if as_json:
        typer.echo(json.dumps({"log": str(into), "records": len(kept), "left_out": skipped}, indent=2))
    else:
        left = f", {counted(len(skipped), 'line')} left out" if skipped else ""
        typer.echo(f"{into}: {counted(len(kept), 'record')}{left}")


def _parsed(content: bytes) -> Iterator[tuple[int, Record | str]]:
    """Number and record of each line, or why it is none."""
    from dance_tvm.records.kernel_log import parse_loosely

    for number, raw in enumerate(content.split(b"\n"), 1):
        if raw.strip():
            yield number, parse_loosely(raw)


@app.command(epilog=examples("dance-tvm logs best", "dance-tvm logs best --json"))
def best(files: Files = None, as_json: AsJson = False) -> None:
    """The verified record of every layer, as builds use it."""
    from dance_tvm.records.kernel_log import Log

    found = []
    for path in _files(files):
        log = _named_faults(path, Log.read(path))
        found += [record for fingerprint in sorted(log.fingerprints) for record in log.best(fingerprint).values()]
    _print(found, as_json)


@app.command(epilog=examples("dance-tvm logs show --last 5", "dance-tvm logs show --layer 8c1f7d2a90b3e645"))
def show(
    files: Files = None,
    layer: Annotated[str, typer.Option(help="Only the workload with this identity.")] = "",
    last: Annotated[int, typer.Option(help="How many records to show.", min=1)] = 40,
    as_json: AsJson = False,
) -> None:
    """The latest records, trials and failures too."""
    from dance_tvm.records.kernel_log import Log

    logs = [_named_faults(path, Log.read(path)) for path in _files(files)]
    found = [record for log in logs for record in log.records(workload=layer or None)]
    if layer and not found:
        raise DanceError(f"no log has a record of --layer {layer}: `dance-tvm logs best` lists the workloads")
    _print(found[-last:], as_json)


def _named_faults(path: Path, log: Log) -> Log:
    """``log``; that it has lines which are no records is said."""
    if count := len(log.problems):
        print(
            f"{path}: {count} of its lines are no records: `dance-tvm logs check {quote(str(path))}` names them",
            file=sys.stderr,
        )
    return log


def _files(files: list[Path] | None) -> list[Path]:
    from dance_tvm.records.places import log_folders
    from dance_tvm.schedules.workload import FAMILIES

    folders = log_folders()

    def within(folder: Path) -> list[Path]:
        found = sorted(path for family in FAMILIES for path in folder.glob(f"*.{family}.jsonl"))
        if not found and folder not in folders:
            raise DanceError(
                f"there are no tuning logs in {folder}: `dance-tvm tune --logs {quote(str(folder))}` writes them"
            )
        return found

    for path in files or []:
        if not path.exists():
            raise DanceError(f"there is no log {path}: `dance-tvm tune` writes them to {folders[0]}")
    if files:
        return [log for path in files for log in (within(path) if path.is_dir() else [path])]
    found = [log for folder in folders for log in within(folder)]
    if not found:
        raise DanceError(f"there are no tuning logs in {folders[0]}: `dance-tvm tune` writes them")
    return found


#: What the description of a kernel adds for its family.
_KINDS: dict[str, Callable[[Workload], str]] = {
    "conv3d_gather": lambda work: "",
    "conv3d_winograd": lambda work: " winograd",
    "conv3d_kgs": lambda work: f" groups {work.group[0]}x{work.group[1]}, {work.kept:.0%} kept",
    "pool3d": lambda work: f" {work.pooling} pool",
    "conv3d_pointwise": lambda work: "",
    "conv3d_line": lambda work: " along lines",
    "depthwise3d": lambda work: " depthwise",
    "conv3d_transposed": lambda work: " transposed",
    "conv3d_planar": lambda work: " channels first",
}
#: What was counted: the head of its column, and by how much its figures are scaled.
_UNITS = {"seconds": ("ms", 1e3), "emulated instructions": ("M instructions", 1e-6)}


def _print(records: list[Record], as_json: bool) -> None:
    """One table for each thing that was counted: times and instructions do not compare."""
    if as_json:
        typer.echo(json.dumps([record.model_dump() for record in records], indent=2))
        return
    for unit, (head, scale) in _UNITS.items():
        rows = [_row(record, scale) for record in records if record.unit == unit]
        if rows:
            heads = ["target", "workload", "kernel", "density", "status", head, "spread", "default", "tile"]
            print_table([*heads, "origin", "date"], rows)


def _row(record: Record, scale: float) -> list[str]:
    work = record.shape
    kernel, out = ("x".join(map(str, extents)) for extents in (work.window.kernel, work.window.out))
    shape = f"{work.channels_in}>{work.channels_out} {kernel}{_KINDS[work.family](work)} @ {out}"
    tile = " ".join(f"{name}={value}" for name, value in record.decisions.items())
    default = f"{scale * record.default_seconds:.3f}" if record.default_seconds else "-"
    time = f"{scale * record.seconds:.3f}" if record.seconds else "-"
    status = f"{record.status}: {record.error}" if record.error else record.status
    return [
        record.target, record.workload_id, shape, f"{work.density:g}", status, time, f"{record.spread:.0%}", default,
        tile, record.origin, record.date[:10],
    ]  # fmt: skip


if __name__ == "__main__":
    start(app, "python -m dance_tvm.logs")
