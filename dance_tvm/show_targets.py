"""``dance-tvm targets``: the machines that networks can be built for."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.options import AsJson
from dance_tvm.core.printing import print_table
from dance_tvm.machines.target import Target, all_targets, load_target

app = application()


@app.command(epilog=examples("dance-tvm targets", "dance-tvm targets snapdragon", "dance-tvm targets host --json"))
def targets(
    name: Annotated[
        str | None, typer.Argument(help="Show one target in full: a name, an alias or a .toml file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the machines that networks can be built for, or show one with the source of each fact."""
    chosen = [load_target(name)] if name else all_targets(look_for_opencl=as_json)
    if as_json:
        facts = [{**target.model_dump(), "fingerprint": target.fingerprint} for target in chosen]
        typer.echo(json.dumps(facts[0] if name else facts, indent=2))
    elif name:
        _print_one(chosen[0])
    else:
        heads = ["target", "aliases", "machine", "cores", "vectors", "threads", "peak GFLOP/s"]
        print_table(heads, map(_row, chosen))


def _row(target: Target) -> list[str]:
    cores = " + ".join(f"{cluster.cores}x {cluster.name}" for cluster in target.clusters)
    vectors = f"{target.vector.registers} of {target.vector.floats} floats"
    described = [target.name, ", ".join(target.aliases), target.description, cores, vectors]
    return [*described, str(target.threads), f"{target.peak_gflops:.0f}"]


def _print_one(target: Target) -> None:
    facts = target.model_dump(exclude={"name", "description", "sources"})
    rows = [[field, json.dumps(value)] for field, value in facts.items()]
    rows.append(["fingerprint", target.fingerprint])
    rows += [[f"source of {fact}", source] for fact, source in target.sources.items()]
    print_table(["field", "value"], rows, title=f"{target.name}: {target.description}")


if __name__ == "__main__":
    start(app, "python -m dance_tvm.show_targets")
