"""``dance-tvm device``: the devices of a tracker and their health, and phones on a cable."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_folder
from dance_tvm.core.options import AsJson
from dance_tvm.core.printing import framed, plain, print_table

TRACKER = "127.0.0.1:9190"
PHONE = "snapdragon"
PROBE_TIMEOUT_S = 5.0

Tracker = Annotated[str, typer.Option(help="HOST:PORT of an RPC tracker.")]
Probe = Annotated[bool, typer.Option(help="Open a session on every free device and ask how it is.")]

app = application(help="The devices of a tracker and their health, and phones on a cable.", no_args_is_help=True)


@dataclass(frozen=True)
class Server:
    """One device server of a tracker; `lost` ones are registered and answered no probe. `runs` is the command of this
    user on this machine that uses it, for `seconds` so far, and `health` what the server reports."""

    key: str
    address: str
    state: Literal["free", "busy", "free or busy", "lost"]
    health: str = ""
    runs: str = ""
    seconds: float | None = None


@app.command("list", epilog=examples("dance-tvm device list", "dance-tvm device list --tracker farm:9190 --probe"))
def list_devices(
    tracker: Tracker = TRACKER,
    probe: Probe = False,
    as_json: AsJson = False,
) -> None:
    """List the tracker's devices: which are free, busy or lost, what runs on them, and how many wait for them."""
    servers, waiting = look(tracker, probe)
    if as_json:
        typer.echo(json.dumps({"servers": [asdict(server) for server in servers], "waiting": waiting}, indent=2))
    elif rows := _rows(servers, waiting):
        print_table(_HEADS, rows, title=f"devices of {tracker}")
    else:
        print(_none_at(tracker))


@app.command(epilog=examples("dance-tvm device watch", "dance-tvm device watch --every 10 --probe"))
def watch(
    tracker: Tracker = TRACKER,
    probe: Probe = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    times: Annotated[
        int | None, typer.Option(min=1, help="How many times to look.", show_default="until Ctrl-C")
    ] = None,
) -> None:
    """Show the tracker's devices until Ctrl-C; if the tracker goes away, wait for it."""
    from rich.live import Live

    from dance_tvm.device import address_of

    address_of(tracker, "--tracker")  # waiting mends a tracker that is away, and no wrong address
    watched = sys.stdout.isatty()
    looks = 0
    with Live(auto_refresh=False) if watched else nullcontext() as live:
        while times is None or looks < times:
            shown = _shown(tracker, probe, framed if live else plain)
            if live:
                live.update(shown, refresh=True)
            else:
                print(shown, flush=True)
            looks += 1
            if times is None or looks < times:
                time.sleep(every)


def _shown(tracker: str, probe: bool, form: Callable[..., Any]) -> Any:
    try:
        rows = _rows(*look(tracker, probe))
        return form(_HEADS, rows, title=f"devices of {tracker}") if rows else _none_at(tracker)
    except DanceError as error:
        return f"{time.strftime('%H:%M:%S')}  {error}"


@app.command("tracker", epilog=examples("dance-tvm device tracker", "dance-tvm device tracker --host 0.0.0.0"))
def serve_tracker(
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind to; 0 takes a free one.")] = 9190,
) -> None:
    """Run the tracker that devices register with and other commands take them from, until Ctrl-C."""
    from dance_tvm.device.serve_tracker import serve

    try:
        serve(host, port)
    except OSError as error:
        raise DanceError(str(error)) from None


@app.command(
    epilog=examples("dance-tvm device phone --key pixel", "dance-tvm device phone tvm-arm64 --key pixel"),
)
def phone(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Folder with a server for arm64: dance_server, or tvm_rpc and its libraries.", show_default=False
        ),
    ] = None,
    tracker: Annotated[str, typer.Option(help="HOST:PORT of the tracker that the phone registers with.")] = TRACKER,
    key: Annotated[str, typer.Option(help="The device's kind in the tracker.")] = "android",
    serial: Annotated[str | None, typer.Option(help="Which phone, where several are connected.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the phone's server.")] = 9090,
    target: Annotated[
        str | None,
        typer.Option(help="Target of the dance_server that is built where no FOLDER is given.", show_default=PHONE),
    ] = None,
) -> None:
    """Push a server onto a phone on a cable, forward its ports, start it and keep it until Ctrl-C."""
    from dance_tvm.device import address_of
    from dance_tvm.device.adb import Adb
    from dance_tvm.device.server_program import build_server
    from dance_tvm.machines.target import load_target

    host, tracker_port = address_of(tracker, "--tracker")
    if host not in ("127.0.0.1", "localhost"):
        raise DanceError(f"a phone on a cable reaches only this machine: start the tracker here, not on {host}")
    if folder is not None and target is not None:
        raise DanceError("--target is for a newly built dance_server: leave out --target or FOLDER")
    if folder is not None and not folder.is_dir():
        raise DanceError(f"there is no folder {folder}: it holds the server for the phone")
    machine = load_target(target or PHONE)
    adb = Adb(serial)
    with TemporaryDirectory(prefix="dance_tvm_phone_") as made:
        if folder is None:
            folder = build_server(machine, Path(made)).parent
        with adb.server(folder, key, tracker_port, port) as server:
            print(f"phone {adb.serial} serves tracker://{tracker}/{key}; Ctrl-C ends it", file=sys.stderr, flush=True)
            server.process.wait()
            last_words = server.last_words()
    raise DanceError(f"the server on phone {adb.serial} ended: {last_words}")


@app.command(
    epilog=examples(
        "dance-tvm device server out --target aarch64-linux", "dance-tvm device server out --target snapdragon"
    )
)
def server(
    folder: Annotated[Path, typer.Argument(help="Folder to write dance_server into.")],
    target: Annotated[str, typer.Option(help="The device's target.")] = PHONE,
) -> None:
    """Write dance_server, a device server that needs no TVM: one small program to copy to a board or phone."""
    from dance_tvm.device.server_program import build_server
    from dance_tvm.machines.target import load_target

    machine = load_target(target)
    require_folder(folder, "FOLDER")
    typer.echo(build_server(machine, folder))
    print(f"for {machine.name}; docs/devices.md says how to start it there", file=sys.stderr)


def look(tracker: str, probe: bool = False) -> tuple[list[Server], dict[str, int]]:
    """The tracker's servers, each tried, and how many requests wait by key."""
    from dance_tvm.device import address_of
    from dance_tvm.device.tracker import no_tracker, tracker_summary

    host, port = address_of(tracker, "--tracker")
    try:
        summary = tracker_summary(host, port, timeout=5)
    except OSError as error:
        raise no_tracker(host, port, error) from None
    queues = summary["queue_info"]
    keys = [info["key"].removeprefix("server:") for info in summary["server_info"]]
    addresses = [f"{info['addr'][0]}:{info['addr'][1]}" for info in summary["server_info"]]
    free = {key: queues.get(key, {}).get("free", 0) for key in keys}
    servers = _in_use(sorted(zip(keys, addresses, strict=True)), free)
    if probe:
        states = _probe(host, port, free)
        servers = [replace(server, **states.get(server.address, {})) for server in servers]
    return servers, {key: queue["pending"] for key, queue in queues.items() if queue["pending"]}


def _in_use(known: list[tuple[str, str]], free: dict[str, int]) -> list[Server]:
    """The servers, by key and address, with what is known of their use.

    A tracker says how many of a key are free, not which: those that a process here holds are none of them.
    """
    from dance_tvm.device.holds import held

    use = held()
    servers = []
    for key, address in known:
        running = use.get(address)
        others = sum(1 for name, each in known if name == key and each not in use)
        state: Literal["free", "busy", "free or busy"]
        state = "free" if free[key] >= others else "busy" if free[key] == 0 else "free or busy"
        if running is None:
            servers.append(Server(key, address, state))
        else:
            since = round(time.time() - running.since, 1)
            servers.append(Server(key, address, "busy", runs=running.command, seconds=since))
    return servers


def _probe(host: str, port: int, free: dict[str, int]) -> dict[str, dict[str, Any]]:
    """By address, what each free device reported; the tracker hands them out in turn."""
    from dance_tvm.benchmarking.sensing import hottest
    from dance_tvm.device import open_server
    from dance_tvm.device.tracker import request_device

    states: dict[str, dict[str, Any]] = {}
    for key in [key for key, count in free.items() for _ in range(count)]:
        address = ""
        try:
            found = request_device(host, port, key, PROBE_TIMEOUT_S)
            address = f"{found[0]}:{found[1]}"
            with open_server(key, *found, PROBE_TIMEOUT_S, PROBE_TIMEOUT_S) as session:
                facts, heat = session.facts(), hottest(session.sensors())
        except DanceError as error:
            states[address] = {"state": "lost", "health": str(error)}
            continue
        words = [facts.get("machine", "TVM's own server"), f"{facts['cpus']} cores" if facts else ""]
        health = ", ".join(word for word in [*words, f"{heat:.0f} °C" if heat else ""] if word)
        states[address] = {"state": "free", "health": health}
    return states


def _none_at(tracker: str) -> str:
    return f"the tracker at {tracker} has no devices: `dance-tvm device phone` brings one (docs/devices.md)"


_HEADS = ["key", "server", "state", "runs", "for", "waiting", "health"]


def _rows(servers: list[Server], waiting: dict[str, int]) -> list[list[str]]:
    rows = [
        [
            server.key,
            server.address,
            server.state,
            server.runs,
            "-" if server.seconds is None else f"{server.seconds:.0f} s",
            str(waiting.get(server.key, 0)),
            server.health,
        ]
        for server in servers
    ]
    absent = sorted(set(waiting) - {server.key for server in servers})
    return rows + [[key, "-", "no such device", "", "-", str(waiting[key]), ""] for key in absent]


if __name__ == "__main__":
    start(app, "python -m dance_tvm.devices")
