"""``dance-tvm groups``: measure which kernel groups a device runs fastest, for RT3D to prune in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from dance_tvm.compiler.requests import require_buildable
from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_folder
from dance_tvm.core.options import PLACES, AsJson, TargetName, Threads
from dance_tvm.core.printing import print_table
from dance_tvm.core.progress import Progress
from dance_tvm.device import require_reachable
from dance_tvm.machines.target import load_target
from dance_tvm.records.group_choice import require_fitting
from dance_tvm.records.places import own_logs
from dance_tvm.tuning.requests import require_devices_of

app = application()


@app.command(
    epilog=examples(
        "dance-tvm groups",
        "dance-tvm groups --target snapdragon --device emulator --layers 1 --group 8x4 --group 16x4",
        "dance-tvm groups --target snapdragon --device emulator --dtype float16 --layers 1 --group 16x8",
    )
)
def groups(
    target: TargetName = "host",
    device: Annotated[str, typer.Option(help=f"{PLACES}.")] = "local",
    threads: Threads = None,
    rate: Annotated[float, typer.Option(min=1.1, help="How many times fewer weights the layers keep.")] = 3.0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each layer.")] = 10,
    layers: Annotated[
        int | None, typer.Option(min=1, help="How many of the synthetic layers.", show_default="all")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="A group such as 16x4; repeatable.", show_default="all that fit")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="The build's: vectors hold twice as many filters in float16."),
    ] = "float32",
    logs: Annotated[Path | None, typer.Option(help="Folder of the log.", show_default="own logs")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure synthesised layers in each kernel group, add the times to the target's log, and name the best group."""
    candidates = [_group(text) for text in group or []]
    machine = load_target(target)
    require_buildable(machine, dtype)
    require_devices_of(machine, [device])
    require_fitting(machine, candidates, dtype)
    require_folder(logs or own_logs(), "--logs")
    require_reachable(device)
    from dance_tvm.records.group_choice import SYNTHESISED, best_group, efficiencies
    from dance_tvm.records.group_log import log_path, write_log
    from dance_tvm.tuning.measure_groups import measure_on

    with Progress(as_json) as progress:
        found = measure_on(
            machine,
            device,
            threads=threads,
            rate=rate,
            repeats=repeats,
            layers=SYNTHESISED[:layers],
            candidates=candidates or None,
            dtype=dtype,
            on_phase=progress.phase,
        )
    log = log_path(machine, logs)
    write_log(log, found)
    shares = {f"{gm}x{gn}": share for (gm, gn), share in sorted(efficiencies(found).items())}
    best = "x".join(map(str, best_group(found)))
    if as_json:
        typer.echo(json.dumps({"best": best, "speed_up_by_rate": shares, "device": device, "log": str(log)}, indent=2))
        return
    rows = [[group, f"{share:.2f}"] for group, share in shares.items()]
    print_table(["group", "speed-up / rate"], rows, f"{machine.name} on {device}, {dtype}: prune in groups of {best}")


def _group(text: str) -> tuple[int, int]:
    """(filters, channels) of a group written as 16x4."""
    filters, _, channels = text.partition("x")
    if not (filters.isdigit() and channels.isdigit() and int(filters) and int(channels)):
        raise DanceError(f"{text!r} is not a kernel group; write filters x channels, such as 16x4")
    return int(filters), int(channels)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.groups")
