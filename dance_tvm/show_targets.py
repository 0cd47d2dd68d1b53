"""``dance-tvm targets``: the machines that networks can be built for."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.core.cli import application, start
from dance_tvm.core.options import AsJson
from dance_tvm.machines.target import Target, all_targets, load_target

app = application()


@app.command()
def targets(
    name: Annotated[
        str | None, typer.Argument(help="Show one target in full: a name, an alias or a .toml file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the machines that networks can be built for, or show one with the source of each fact."""
    chosen = [load_target(name)] if name else all_targets()
    if as_json:
        facts = [{**target.model_dump(), "fingerprint": target.fingerprint} for target in chosen]
        typer.echo(json.dumps(facts[0] if name else facts, indent=2))
    elif name:
        _print_one(chosen[0])
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(_table(chosen))


def _table(chosen: list[Target]) -> Table:
    table = Table("target", "aliases", "machine", "cores", "vectors", "threads", "peak GFLOP/s")
    for target in chosen:
        cores = " + ".join(f"{cluster.cores}x {cluster.name}" for cluster in target.clusters)
        vectors = f"{target.vector.registers} of {target.vector.floats} floats"
        row = [target.name, ", ".join(target.aliases), target.description, cores, vectors, str(target.threads)]
        table.add_row(*row, f"{target.peak_gflops:.0f}")
    return table


def _print_one(target: Target) -> None:
    table = Table("field", "value", title=f"{target.name}: {target.description}")
    for field, value in target.model_dump(exclude={"name", "description", "sources"}).items():
        table.add_row(field, json.dumps(value))
    table.add_row("fingerprint", target.fingerprint)
    for fact, source in target.sources.items():
        table.add_row(f"source of {fact}", source)
    Console().print(table)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.show_targets")
