"""``dance-tvm tune``: search the fastest tiles for a network on a real device."""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dance_tvm.benchmarking.clips import require_clips
from dance_tvm.compiler.requests import require_buildable
from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.files import require_folder, require_suffix, require_writable
from dance_tvm.core.interrupts import INTERRUPTED
from dance_tvm.core.options import AsJson, Devices, Model, TargetName, Threads
from dance_tvm.core.printing import counted, framed, print_table
from dance_tvm.core.progress import JsonLines, Progress
from dance_tvm.core.verbosity import level
from dance_tvm.device import require_reachable
from dance_tvm.models.network_files import require_network
from dance_tvm.records.places import own_logs
from dance_tvm.tuning.requests import require_devices_of

if TYPE_CHECKING:
    from dance_tvm.schedules.workload import Workload
    from dance_tvm.tuning.tasks import Task
    from dance_tvm.tuning.tuner import Tuner

app = application()


@app.command(
    epilog=examples(
        "dance-tvm tune --model c3d-mini --trials 64",
        "dance-tvm tune --model net.pt2 --target snapdragon --device tracker://127.0.0.1:9190/phone",
        "dance-tvm tune --model net.pt2 --logs lab-logs && dance-tvm build --model net.pt2 --logs lab-logs",
    )
)
def tune(
    model: Model = "c3d-mini",
    target: TargetName = "host",
    device: Devices = None,
    trials: Annotated[int, typer.Option(help="Trials per layer, counting those of earlier runs.")] = 64,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which no new batch is begun.")] = None,
    layers: Annotated[list[str] | None, typer.Option(help="Only layers that match this pattern.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Tune masked layers at this density.")] = None,
    masks: Annotated[
        str, typer.Option(help="Tune as though masks thinned these axes, e.g. in_frames,in_channels,out_channels.")
    ] = "",
    conv: Annotated[Literal["auto", "direct", "winograd"], typer.Option(help="Only kernels of this kind.")] = "auto",
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Kernels of builds with this --dtype.")
    ] = "float32",
    clips: Annotated[str, typer.Option(help="Tune masked layers at the densities that these clips show.")] = "",
    weights: Annotated[Path | None, typer.Option(help="Trained weights; tile sizes do not depend on them.")] = None,
    threads: Threads = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trials to build at the same time.")] = None,
    trial_timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a trial is ended.")] = 30.0,
    logs: Annotated[Path | None, typer.Option(help="Folder of the logs.", show_default="own logs")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the search to this .html file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    as_json: AsJson = False,
    json_lines: JsonLines = False,
) -> None:
    """Search for the fastest tiles for a network on a real device, and keep them in the target's tuning log."""
    _require_numbers(trials, time_limit, density or [])
    if plot is not None:
        _require_plot(plot)
    from dance_tvm.machines.host import available_cores
    from dance_tvm.machines.target import load_target

    machine = load_target(target)
    axes = _axes(masks)
    require_devices_of(machine, device or ["local"])
    require_network(model, weights)
    require_buildable(machine, dtype)
    if machine.gpu is not None and conv == "winograd":
        raise DanceError(f"--conv winograd: {machine.name} is a GPU, and Winograd's kernels are a processor's")
    if clips:
        require_clips(clips)
    require_folder(logs or own_logs(), "--logs")
    for spec in device or ["local"]:
        require_reachable(spec)
    from dance_tvm.lowering.machine import gpu_of, machine_of
    from dance_tvm.tuning.farm import Farm
    from dance_tvm.tuning.libraries import require_gpu, require_processor
    from dance_tvm.tuning.tasks import Plan
    from dance_tvm.tuning.tuner import Tuner
    from dance_tvm.tuning.workloads import layers_of

    found = layers_of(
        model,
        machine,
        weights=weights,
        threads=threads,
        densities=density or [],
        lists=axes,
        only=layers or [],
        conv=conv,
        clips=clips,
        dtype=dtype,
    )
    if density and not any(layer.workload.lists for layer in found):
        said = f"--density is of layers that masks thin, and {model} has none: --masks tunes as though it had"
        warnings.warn(said, DanceWarning, stacklevel=2)
    plan = Plan(trials, time_limit or float("inf"), jobs or available_cores(), seed)
    with Farm(device or ["local"], trial_timeout) as farm:
        require_processor(farm, machine)
        require_gpu(farm, str(machine.tvm["kind"]))
        tuner = Tuner(machine, gpu_of(machine) or machine_of(machine), found, farm, plan, logs)
        progress = Progress(as_json, json_lines)
        _search(tuner, progress, watched=sys.stderr.isatty() and not as_json and not json_lines and level() >= 0)
    if plot is not None:
        _plot(tuner, plot)
    progress.result(facts(tuner))
    if as_json:
        typer.echo(json.dumps(facts(tuner), indent=2))
    elif not json_lines:
        _print(tuner)
    if tuner.lost:
        raise DanceError(f"the devices are gone ({tuner.lost}); what was measured is in {_logs(tuner)}")
    if tuner.stopped:
        raise typer.Exit(INTERRUPTED)


def _require_numbers(trials: int, time_limit: float | None, density: list[float]) -> None:
    """Raise DanceError for amounts that no search can have."""
    if trials < 1:
        raise DanceError("--trials must be at least 1: with none there is nothing to search")
    if time_limit is not None and time_limit <= 0:
        raise DanceError("--time-limit must be above 0: leave it out for none")
    if any(not 0 < value <= 1 for value in density):
        raise DanceError("--density must lie between 0 and 1, 1 included")


def _require_plot(path: Path) -> None:
    """Raise DanceError where no plot can be drawn or written."""
    if find_spec("jinja2") is None:
        raise DanceError("--plot needs jinja2: install it with `pip install jinja2`")
    require_suffix(path, "--plot", (".html",))
    require_writable(path, "--plot")


def _axes(masks: str) -> list[str]:
    from dance_tvm.schedules.workload import LISTS

    axes = [axis for axis in masks.split(",") if axis]
    if unknown := sorted(set(axes) - set(LISTS)):
        raise DanceError(f"--masks knows {', '.join(LISTS)}, not {', '.join(unknown)}")
    return axes


def _search(tuner: Tuner, progress: Progress, watched: bool) -> None:
    """Run the tuner and show how it goes: live where somebody watches, else a line an event."""
    for name, number, reason in tuner.problems[:10]:
        progress.say(f"{name}, line {number}: {reason}; skipped")
    # Other than printing, this may happen in the middle of another print.
    tuner.on_stop = lambda: os.write(2, b"interrupted: trials in flight are given up, what was measured is kept\n")
    if tuner.model_name != "xgboost":
        progress.say(f"cost model: {tuner.model_name}")
    if not watched:
        tuner.on_event = lambda sentence: progress.tell("batch", sentence, trials=tuner.made)
        tuner.run()
        return
    from rich.console import Console
    from rich.live import Live

    with Live(_view(tuner), console=Console(stderr=True), transient=True) as live:
        tuner.on_event = lambda _sentence: live.update(_view(tuner))
        tuner.run()


def facts(tuner: Tuner) -> dict[str, Any]:
    """What came of a run, ready for JSON; seconds of one call."""
    layers = []
    for task in tuner.tasks:
        workload = task.layer.workload
        after = task.after or (task.best if task.best < float("inf") else 0.0)
        layers.append(
            {
                "layers": task.layer.names,
                "family": workload.family,
                "density": workload.density,
                "trials": task.trials,
                "failed": task.failures,
                "verified": bool(task.after),
                "unverified_because": _why_unverified(tuner, task),
                "before_seconds": task.before,
                "after_seconds": after,
                "share_of_peak": _share(tuner, workload, after),
                "decisions": task.best_decisions,
            }
        )
    return {
        "logs": [str(path) for path in tuner.paths.values()],
        "cost_model": tuner.model_name,
        "unit": tuner.unit,
        "trials": tuner.made,
        "interrupted": tuner.stopped,
        "layers": layers,
        "all_layers_before_seconds": _all_layers(tuner, "before"),
        "all_layers_after_seconds": _all_layers(tuner, "after"),
        "devices": [vars(health) | {"dropped": health.dropped} for health in tuner.farm.health.values()],
    }


def _why_unverified(tuner: Tuner, task: Task) -> str:
    """Why a layer has nothing that builds will use; empty where it has."""
    if task.after:
        return ""
    if not task.trials:
        return "no trial was made"
    if not task.best_decisions:
        return f"{counted(task.failures, 'trial')} failed, and none ran"
    return task.unverified or ("the devices are gone" if tuner.lost else "the run ended before")


def _share(tuner: Tuner, workload: Workload, seconds: float) -> float | None:
    """Share of the peak that a direct convolution would need for this time; None where it is not known, as of pools."""
    from dance_tvm.schedules.workload import POOL

    gpu = tuner.target.gpu
    known = tuner.unit == "seconds" and 0 < seconds < float("inf") and workload.family != POOL
    if not known or (gpu is not None and gpu.assumed):
        return None
    peak = tuner.target.peak_gflops * (2 if gpu is None and workload.dtype == "float16" else 1)
    return 2e-9 * workload.work / seconds / peak


def _all_layers(tuner: Tuner, which: str) -> float:
    """Sum over the verified layers, each with the fastest of its families at its densest."""
    fastest: dict[str, tuple[float, float]] = {}
    for task in tuner.tasks:
        for name in task.layer.names if task.after else []:
            known = (-task.layer.workload.density, getattr(task, which))
            fastest[name] = min(known, fastest.get(name, known))
    return sum(seconds for _, seconds in fastest.values())


def _view(tuner: Tuner) -> Any:
    """The live view: best time by layer, share of peak, trials left, devices and their health."""
    rows = []
    for task in tuner.tasks:
        known = task.best < float("inf")
        share = _share(tuner, task.layer.workload, task.best)
        left = 0 if task.exhausted else max(0, tuner.plan.trials - task.trials)
        best = tuner.shown(task.best) if known else ""
        of_peak = f"{share:.0%}" if share else ""
        name = f"{task.layer.title}{f' x{task.layer.count}' if task.layer.count > 1 else ''}"
        rows.append([name, f"{task.layer.workload.density:g}", str(task.trials), str(left), best, of_peak])
    health = [f"{each.name}: {'dropped' if each.dropped else each.done}" for each in tuner.farm.health.values()]
    heads = ["layer", "density", "trials", "left", "best", "of peak"]
    return framed(heads, rows, f"tuning for {tuner.target.name}", "   ".join(health))


def _print(tuner: Tuner) -> None:
    from dance_tvm.tuning.workloads import KINDS

    rows = []
    for task in tuner.tasks:
        share = _share(tuner, task.layer.workload, task.after)
        rows.append([
            ", ".join(task.layer.names) + KINDS.get(task.layer.workload.family, ""),
            f"{task.layer.workload.density:g}", str(task.trials),
            *(tuner.shown(value) if task.after else "-" for value in (task.before, task.after)),
            f"{task.before / task.after:.2f}x" if task.after else "-", f"{share:.0%}" if share else "-",
            _why_unverified(tuner, task),
        ])  # fmt: skip
    heads = ["layer", "density", "trials", "before", "after", "gain", "of peak"]
    without = any(row[-1] for row in rows)
    if not without:
        rows = [row[:-1] for row in rows]
    said = "trials: of all runs; before: with the defaults; after: with the fastest, both verified in turns"
    print_table([*heads, "not verified, for"] if without else heads, rows, caption=said)
    before, after = _all_layers(tuner, "before"), _all_layers(tuner, "after")
    if after:
        both = f"{tuner.shown(before)} before, {tuner.shown(after)} after"
        typer.echo(f"all verified layers, each in its faster family: {both}")
    for device in tuner.farm.health.values():
        failed = f"; {counted(device.failed, 'session')} failed" if device.failed else ""
        if device.dropped or failed:
            typer.echo(f"{device.name}{f': dropped, {device.said}' if device.dropped else ''}{failed}")
    state = "interrupted: run again to continue" if tuner.stopped else "done"
    typer.echo(f"{counted(tuner.made, 'trial')} in this run, {state}; cost model {tuner.model_name}; {_logs(tuner)}")


def _logs(tuner: Tuner) -> str:
    return ", ".join(str(path) for path in tuner.paths.values())


def _plot(tuner: Tuner, path: Path) -> None:
    from dance_tvm.reporting import page
    from dance_tvm.reporting.charts import curves

    gains = {}
    for task in tuner.tasks:
        found = [value for value in task.history if value < float("inf")]
        if found:
            gains[task.layer.title] = [found[0] / value for value in found]
    page.write_text(path, page.html(page.of_chart("Tuning", curves("Best time by trial", gains))))


if __name__ == "__main__":
    start(app, "python -m dance_tvm.tune")
