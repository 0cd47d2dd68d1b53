"""``dance-tvm bench``: time artifacts on devices, by clip and by layer, against dense and against the work saved."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dance_tvm.benchmarking.accuracy import read_classes
from dance_tvm.benchmarking.clips import MOST_CLIPS
from dance_tvm.benchmarking.peers import require_peers
from dance_tvm.benchmarking.requests import require_measurable
from dance_tvm.benchmarking.results import read_results, write_results
from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_apart, require_suffix, require_writable
from dance_tvm.core.options import MOST_THREADS, AsJson, Devices
from dance_tvm.core.printing import counted, duration, print_table
from dance_tvm.core.progress import JsonLines, Progress
from dance_tvm.device import require_spec

if TYPE_CHECKING:
    from dance_tvm.benchmarking.results import Measured, Profile, Results

REGRESSION = 3

#: From how much slower on it is a regression, unless told.
THRESHOLD = 0.05

app = application()


@app.command(
    epilog=examples(
        "dance-tvm bench artifacts/c3d-host",
        "dance-tvm bench artifacts/pruned --dense artifacts/dense --clips videos/ --out results.json",
        "dance-tvm bench artifacts/c3d-host --against results.json",
        "dance-tvm bench artifacts/c3d-host --peer onnxruntime,openvino --peer-model c3d.onnx --load-times",
        "dance-tvm bench artifacts/c3d-phone --device tracker://127.0.0.1:9190/phone --trace trace.json",
    )
)
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Folders written by `dance-tvm build`.")],
    dense: Annotated[Path | None, typer.Option(help="The dense network's artifact, measured in turns.")] = None,
    device: Devices = None,
    runs: Annotated[int, typer.Option(min=2, help="Minimum runs of each artifact.")] = 20,
    seconds: Annotated[float, typer.Option(min=0.0, help="Minimum seconds for each artifact.")] = 2.0,
    stream: Annotated[
        bool,
        typer.Option("--single-stream", help="Also measure MLPerf's single stream: at least 1,024 queries and 60 s."),
    ] = False,
    clips: Annotated[str | None, typer.Option(help="Folder of videos, .npz, or what `train --data` takes.")] = None,
    most_clips: Annotated[
        int | None, typer.Option(min=1, help="Take at most this many clips.", show_default=str(MOST_CLIPS))
    ] = None,
    layers: Annotated[bool, typer.Option(help="Time every layer.")] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads; default: those of the build.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="Run on this cluster of the target file.")] = None,
    cpus: Annotated[str | None, typer.Option(help="Run on these CPUs, e.g. 4-7 or 0,2.")] = None,
    cool_down: Annotated[float, typer.Option(min=0.0, help="Seconds of rest after each round.")] = 0.0,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for a device.")] = 600.0,
    call_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds for one upload step or measurement.")] = 600.0,
    against: Annotated[Path | None, typer.Option(help="Earlier results; exit code 3 if now slower.")] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, help="How much slower is a regression.", show_default=str(THRESHOLD))
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results (.json) here.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a timeline of one run here (.json), for Perfetto or chrome://tracing.")
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(help="Other engines to measure in turns: onnxruntime, openvino or both, separated by a comma."),
    ] = None,
    peer_model: Annotated[Path | None, typer.Option(help="The first artifact's network as .onnx, for --peer.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--truth", help="Classes of --clips (.csv lines of clip,number), to report accuracy."),
    ] = None,
    load_times: Annotated[
        bool, typer.Option("--load-times", help="Also time loading, in a process of its own: cold, then warm.")
    ] = False,
    as_json: AsJson = False,
    json_lines: JsonLines = False,
) -> None:
    """Time artifacts on devices: latency and its spread, by clip and by layer, against dense and the work saved."""
    _require_agreeing(cluster, cpus, trace, layers)
    _require_used({"--most-clips": most_clips, "--truth": labels}, {"--clips": clips})
    _require_used({"--threshold": threshold}, {"--against": against})
    _require_used({"--peer-model": peer_model}, {"--peer": peer})
    devices = device or ["local"]
    engines = [name.strip() for name in peer.split(",") if name.strip()] if peer else []
    _require_named(devices, {"--out": out, "--trace": trace})
    for option, written in (("--out", out), ("--trace", trace)):
        if written is not None:
            require_apart(written, option, {"--against": against})
    require_peers(engines, peer_model, devices)
    own_cpus = parse_cpus(cpus) if cpus else None
    if load_times and devices != ["local"]:
        raise DanceError("--load-times measures on this machine: leave --device out")
    baseline = read_results(against) if against else None
    classes = read_classes(labels) if labels else {}
    known = require_measurable(
        artifacts, dense, devices, cluster=cluster, cpus=own_cpus, clips=clips, classes=classes, against=baseline
    )
    from dance_tvm.benchmarking.campaign import run
    from dance_tvm.benchmarking.plan import Plan

    plan = Plan(
        artifacts=artifacts,
        dense=dense,
        devices=devices,
        runs=runs,
        seconds=seconds,
        single_stream=stream,
        clips=clips,
        most_clips=most_clips or MOST_CLIPS,
        layers=layers,
        threads=threads,
        cluster=cluster,
        cpus=own_cpus,
        cool_down=cool_down,
        timeout=timeout,
        call_timeout=call_timeout,
        against=baseline,
        threshold=THRESHOLD if threshold is None else threshold,
        trace=trace,
        peers=engines,
        peer_model=peer_model,
        labels=labels,
        classes=classes,
        load_times=load_times,
        command=shlex.join(["dance-tvm", "bench", *sys.argv[_own_arguments() :]]),
    )
    progress = Progress(as_json, json_lines)
    results = run(plan, lambda sentence: progress.tell("step", sentence), known)
    if out:
        write_results(out, results)
    progress.result(results.model_dump())
    if as_json:
        typer.echo(results.model_dump_json(indent=1))
    elif not json_lines:
        _print(results)
    if any(verdict.verdict == "slower" for verdict in results.verdicts):
        raise typer.Exit(REGRESSION)


def _require_agreeing(cluster: str | None, cpus: str | None, trace: Path | None, layers: bool) -> None:
    """Raise DanceError for options that contradict each other."""
    if cluster and cpus:
        raise DanceError("give --cluster or --cpus, not both")
    if trace and not layers:
        raise DanceError("--trace shows layers: leave --no-layers out")


def _require_used(given: Mapping[str, object], needed: Mapping[str, object]) -> None:
    """Raise DanceError for an option that does nothing without the ``needed`` one."""
    for option, value in given.items():
        for other, wanted in needed.items():
            if value is not None and wanted is None:
                raise DanceError(f"{option} does nothing without {other}: give that too, or leave {option} out")


def _require_named(devices: Sequence[str], results: Mapping[str, Path | None]) -> None:
    """Raise DanceError for devices that are none, and for results of another kind or in no place, by option."""
    for spec in devices:
        require_spec(spec)
    for option, path in results.items():
        if path is not None:
            require_suffix(path, option, (".json",))
            require_writable(path, option)


def parse_cpus(text: str) -> list[int]:
    """CPU numbers of `4-7` or `0,2`. Raises DanceError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise DanceError(f"--cpus must be like 4-7 or 0,2, not {text!r}")
        if last and int(last) < int(first):
            raise DanceError(f"--cpus {text}: {part} has no CPUs, for {last} is below {first}")
        found += range(int(first), int(last or first) + 1)
    return found


def _own_arguments() -> int:
    """Where this command's words begin: behind `dance-tvm bench`, or behind `python -m dance_tvm.bench`."""
    return 2 if sys.argv[1:2] == ["bench"] else 1


def _print(results: Results) -> None:
    for device in results.devices:
        _print_summary(device.spec, device.measured)
        for item in device.measured:
            if item.profile:
                _print_layers(item.name, item.profile)
            if item.clips:
                _print_clips(item)
            for note in item.notes:
                typer.echo(f"{item.name}: {note}")
            for line in _extras(item):
                typer.echo(line)
            if item.single_stream:
                typer.echo(_stream(item.name, item.single_stream))
        for warning in device.warnings:
            typer.echo(f"! {warning}")
    for each in results.peers:
        typer.echo(
            f"{each.device}: {each.artifact} is {each.speed_up:.2f}x as fast as {each.engine} {each.version} "
            f"(95% between {each.low:.2f} and {each.high:.2f}), which takes {duration(each.latency.p50)}; outputs "
            f"differ by {each.difference:.1g} of the largest value"
        )
    for pair in results.pairs:
        many = pair.over_clips
        less = (many or pair).mac_reduction
        saved = f", {less:.2f}x fewer MACs" if less else ""
        span = f"95% between {pair.low:.2f} and {pair.high:.2f}"
        if many:
            span = f"the mean of {counted(many.count, 'clip')}, from {many.least:.2f} to {many.most:.2f}"
        ratio = f", {pair.efficiency:.0%} of the saving became speed" if pair.efficiency else ""
        typer.echo(
            f"{pair.device}: {pair.sparse} is {(many or pair).speed_up:.2f}x as fast as {pair.dense} "
            f"({span}){saved}{ratio}"
        )
    for verdict in results.verdicts:
        how = "in turns" if verdict.interleaved else "at another time"
        what = "its library is identical, so the ratio is the machine's" if verdict.identical else f"measured {how}"
        typer.echo(
            f"{verdict.device}: {verdict.artifact} is {_VERDICTS[verdict.verdict]}: {verdict.ratio:.3f} of its time "
            f"(95% between {verdict.low:.3f} and {verdict.high:.3f}, {what})"
        )


_VERDICTS = {
    "faster": "faster than the baseline",
    "same": "as fast as the baseline",
    "slower": "slower than the baseline",
    "undecided": "not told apart from the baseline",
}


#: What a share below 100 % says even of a dense network.
_OF_DENSE = "of dense: the share done of all multiply-accumulates; masks, pruned weights and padding leave the rest out"


def _print_summary(spec: str, measured: list[Measured]) -> None:
    pairs = any(item.role != "other" for item in measured)
    heads = ["artifact", *(["role"] if pairs else []), "p50 ms", "p90 ms", "p99 ms", "spread", "runs", "frames/s"]
    rows = []
    for item in measured:
        times = [f"{1e3 * value:.3f}" for value in (item.latency.p50, item.latency.p90, item.latency.p99)]
        done, kept = item.executed_macs, None
        if done is not None and item.macs:
            kept = f"{done / item.macs:.0%}"
        joules = f"{1e3 * item.energy.joules:.2f}" if item.energy else "-"
        memory = f"{item.peak_memory_bytes / 2**20:.0f}" if item.peak_memory_bytes else "-"
        rows.append([
            item.artifact, *([item.role] if pairs else []), *times, f"{item.latency.spread:.1%}",
            str(item.latency.runs), f"{item.frames_per_second:.0f}", "-" if done is None else f"{done / 1e9:.3f}",
            kept or "-", "-" if item.gflops is None else f"{item.gflops:.1f}",
            "-" if item.share_of_peak is None else f"{item.share_of_peak:.0%}", memory, joules,
            item.energy.kind if item.energy else "-",
        ])  # fmt: skip
    heads += ["GMACs done", "of dense", "GFLOP/s", "of peak", "peak MiB", "mJ", "energy"]
    print_table(heads, rows, title=spec, caption=_OF_DENSE)


def _print_layers(name: str, profile: Profile) -> None:
    heads = ["layer", "kernel", "µs", "MMACs done", "of dense", "frames", "positions", "channels in", "channels out"]
    rows = [
        [
            layer.name, layer.kernel, f"{1e6 * layer.seconds:,.1f}", f"{layer.executed_macs / 1e6:.2f}",
            _share(layer.executed_macs / layer.macs if layer.macs else None), _share(layer.kept_frames),
            _share(layer.kept_positions), _share(layer.kept_channels_in), _share(layer.kept_channels_out),
            f"{layer.gflops:.1f}", f"{layer.bytes / 1e6:.2f}",
        ]
        for layer in profile.layers
    ]  # fmt: skip
    title = f"{name} by layer, {profile.clip}: {profile.explained:.0%} of the whole explained"
    print_table([*heads, "GFLOP/s", "MB"], rows, title=title)


def _print_clips(item: Measured) -> None:
    rows = [[clip.name, f"{1e3 * clip.p50:.3f}", f"{1e3 * clip.p90:.3f}", _share(clip.kept)] for clip in item.clips]
    correlation = item.correlation
    caption = "" if correlation is None else f"correlation of latency and MACs kept: {correlation:.2f}"
    print_table(["clip", "p50 ms", "p90 ms", "MACs kept"], rows, f"{item.name} by clip", caption)


def _extras(item: Measured) -> list[str]:
    """How right, and how long until the first answer."""
    lines = []
    if item.accuracy:
        known = item.accuracy
        lines.append(
            f"{item.name}: {known.top1:.1%} of {counted(known.clips, 'labelled clip')} right ({known.top5:.1%} among "
            f"the first five); of {counted(known.videos, 'video')} {known.video_top1:.1%} ({known.video_top5:.1%})"
        )
    for each in item.loading:
        whole = each.verify + each.load + each.first_run
        lines.append(
            f"{item.name}, {'cold' if each.cold else 'warm'} start: {1e3 * whole:.0f} ms to the first answer (verify "
            f"{1e3 * each.verify:.0f}, load {1e3 * each.load:.0f}, first run {1e3 * each.first_run:.0f})"
        )
    return lines


def _stream(name: str, figures: dict[str, float]) -> str:
    return (
        f"{name}, single stream: 90th percentile {1e3 * figures['p90']:.2f} ms over {figures['queries']:,.0f} queries "
        f"in {figures['seconds']:.0f} s, {figures['queries_per_second']:.2f} queries a second"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


if __name__ == "__main__":
    start(app, "python -m dance_tvm.bench")
