"""``dance-tvm bench``: time artifacts on devices, by clip and by layer, against dense and against the work saved."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.core.cli import application, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.options import AsJson, Devices

if TYPE_CHECKING:
    from dance_tvm.benchmarking.results import Measured, Profile, Results

REGRESSION = 3

app = application()


@app.command()
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Folders written by `dance-tvm build`.")],
    dense: Annotated[Path | None, typer.Option(help="The dense network's artifact, measured in turns.")] = None,
    device: Devices = None,
    runs: Annotated[int, typer.Option(min=2, help="Runs of each artifact, at least.")] = 20,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds for each artifact, at least.")] = 2.0,
    stream: Annotated[
        bool, typer.Option("--single-stream", help="MLPerf's single stream too: 1,024 queries and 60 s at least.")
    ] = False,
    clips: Annotated[str | None, typer.Option(help="Folder of videos, .npz, or what `train --data` takes.")] = None,
    most_clips: Annotated[int, typer.Option(min=1, help="Clips to take at most.")] = 100,
    layers: Annotated[bool, typer.Option(help="Time every layer.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; those of the build unless given.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Run on this cluster of the target file.")] = None,
    cpus: Annotated[str | None, typer.Option(help="Run on these CPUs, as 4-7 or 0,2.")] = None,
    cool_down: Annotated[float, typer.Option(min=0.0, help="Seconds of rest after each round.")] = 0.0,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for a device's turn.")] = 600.0,
    call_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds for one upload step or measurement.")] = 600.0,
    against: Annotated[Path | None, typer.Option(help="Earlier results; exit code 3 if now slower.")] = None,
    threshold: Annotated[float, typer.Option(min=0.0, help="How much slower is a regression.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="Write the results (JSON) here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time artifacts on devices: how long, how steady, by clip, by layer, against dense, against the work saved."""
    from dance_tvm.benchmarking.campaign import Plan, run
    from dance_tvm.benchmarking.results import read_results, write_results

    if cluster and cpus:
        raise DanceError("give --cluster or --cpus, not both")
    plan = Plan(
        artifacts=artifacts,
        dense=dense,
        devices=device or ["local"],
        runs=runs,
        seconds=seconds,
        single_stream=stream,
        clips=clips,
        most_clips=most_clips,
        layers=layers,
        threads=threads,
        cluster=cluster,
        cpus=parse_cpus(cpus) if cpus else None,
        cool_down=cool_down,
        timeout=timeout,
        call_timeout=call_timeout,
        against=read_results(against) if against else None,
        threshold=threshold,
        command=shlex.join(["dance-tvm", "bench", *sys.argv[_own_arguments() :]]),
    )
    messages = Console(stderr=True)
    results = run(plan, (lambda _sentence: None) if as_json else messages.print)
    if out:
        write_results(out, results)
    if as_json:
        typer.echo(results.model_dump_json(indent=1))
    else:
        _print(results)
    if any(verdict.verdict == "slower" for verdict in results.verdicts):
        raise typer.Exit(REGRESSION)


def parse_cpus(text: str) -> list[int]:
    """CPU numbers of `4-7` or `0,2`. Raises DanceError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise DanceError(f"--cpus must be like 4-7 or 0,2, not {text!r}")
        found += range(int(first), int(last or first) + 1)
    return found


def _own_arguments() -> int:
    """Where this command's words begin: behind `dance-tvm bench`, or behind `python -m dance_tvm.bench`."""
    return 2 if sys.argv[1:2] == ["bench"] else 1


def _print(results: Results) -> None:
    console = Console(width=None if sys.stdout.isatty() else 180)
    for device in results.devices:
        console.print(_summary(device.spec, device.measured))
        for item in device.measured:
            if item.profile:
                console.print(_layers(item.name, item.profile))
            if item.clips:
                console.print(_clips(item))
            if item.single_stream:
                console.print(_stream(item.name, item.single_stream))
        for warning in device.warnings:
            console.print(f"[yellow]![/] {warning}")
    for pair in results.pairs:
        saved = f", {pair.mac_reduction:.2f}x fewer MACs" if pair.mac_reduction else ""
        ratio = f", {pair.efficiency:.0%} of the saving became speed" if pair.efficiency else ""
        console.print(
            f"{pair.device}: {pair.sparse} is {pair.speed_up:.2f}x as fast as {pair.dense} "
            f"(95% between {pair.low:.2f} and {pair.high:.2f}){saved}{ratio}"
        )
    for verdict in results.verdicts:
        how = "in turns" if verdict.interleaved else "at another time"
        console.print(
            f"{verdict.device}: {verdict.artifact} is {verdict.verdict}: {verdict.ratio:.3f} of the baseline's time "
            f"(95% between {verdict.low:.3f} and {verdict.high:.3f}, measured {how})"
        )


def _summary(spec: str, measured: list[Measured]) -> Table:
    heads = ["artifact", "role", "p50 ms", "p90 ms", "p99 ms", "spread", "runs", "frames/s", "GMACs done", "of dense"]
    table = Table(*heads, "GFLOP/s", "of peak", "peak MiB", "mJ", title=spec)
    for item in measured:
        times = [f"{1e3 * value:.3f}" for value in (item.latency.p50, item.latency.p90, item.latency.p99)]
        done, kept = item.executed_macs, None
        if done is not None and item.macs:
            kept = f"{done / item.macs:.0%}"
        joules = f"{1e3 * item.energy.joules:.2f} ({item.energy.kind})" if item.energy else "-"
        memory = f"{item.peak_memory_bytes / 2**20:.0f}" if item.peak_memory_bytes else "-"
        table.add_row(
            item.artifact, item.role, *times, f"{item.latency.spread:.1%}", str(item.latency.runs),
            f"{item.frames_per_second:.0f}", "-" if done is None else f"{done / 1e9:.3f}", kept or "-",
            "-" if item.gflops is None else f"{item.gflops:.1f}",
            "-" if item.share_of_peak is None else f"{item.share_of_peak:.0%}", memory, joules,
        )  # fmt: skip
    return table


def _layers(name: str, profile: Profile) -> Table:
    title = f"{name} by layer, {profile.clip}: {profile.explained:.0%} of the whole explained"
    heads = ["layer", "kernel", "ms", "MMACs done", "of dense", "frames", "positions", "channels in / out"]
    table = Table(*heads, "GFLOP/s", "MB", title=title)
    for layer in profile.layers:
        channels = f"{_share(layer.kept_channels_in)} / {_share(layer.kept_channels_out)}"
        table.add_row(
            layer.name, layer.kernel, f"{1e3 * layer.seconds:.3f}", f"{layer.executed_macs / 1e6:.2f}",
            _share(layer.executed_macs / layer.macs if layer.macs else None), _share(layer.kept_frames),
            _share(layer.kept_positions), channels, f"{layer.gflops:.1f}", f"{layer.bytes / 1e6:.2f}",
        )  # fmt: skip
    return table


def _clips(item: Measured) -> Table:
    table = Table("clip", "p50 ms", "p90 ms", "MACs kept", title=f"{item.name} by clip")
    for clip in item.clips:
        table.add_row(clip.name, f"{1e3 * clip.p50:.3f}", f"{1e3 * clip.p90:.3f}", _share(clip.kept))
    correlation = item.correlation
    if correlation is not None:
        table.caption = f"correlation of latency and MACs kept: {correlation:.2f}"
    return table


def _stream(name: str, figures: dict[str, float]) -> str:
    return (
        f"{name}, single stream: 90th percentile {1e3 * figures['p90']:.2f} ms over {figures['queries']:,.0f} queries "
        f"in {figures['seconds']:.0f} s, {figures['queries_per_second']:.2f} queries a second"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


if __name__ == "__main__":
    start(app, "python -m dance_tvm.bench")
