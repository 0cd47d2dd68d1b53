"""``dance-tvm units``: what the kernels of a network can leave out together, and what that is predicted to save."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_suffix, require_writable
from dance_tvm.core.options import AsJson, Model, TargetName, Threads
from dance_tvm.core.printing import Table, print_tables
from dance_tvm.core.progress import Progress

if TYPE_CHECKING:
    from dance_tvm.lowering.choose_kernel import Memory
    from dance_tvm.lowering.lowered import Lowered
    from dance_tvm.machines.target import Target
    from dance_tvm.schedules.cpu.units import Serving
    from dance_tvm.schedules.workload import Workload
    from dance_tvm.sparsity.units import Units

Dtype = Literal["float32", "float16"]

app = application()


@app.command(
    epilog=examples(
        "dance-tvm units --model c3d --target snapdragon",
        "dance-tvm units --model c3d-mini --out units.json",
        "dance-tvm train --method aap --model c3d-mini --set units=units.json",
    )
)
def units(
    model: Model = "c3d-mini",
    target: TargetName = "host",
    threads: Threads = None,
    kernels: Annotated[
        int | None,
        typer.Option(min=1, help="Kernels to list for each layer, the best first.", show_default="1; all with --json"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the sites' units, for `train --set units=FILE`.")] = None,
    as_json: AsJson = False,
    memory: Annotated[
        Literal["balanced", "fast"], typer.Option(help="The build's: which kernels large layers may have.")
    ] = "balanced",
    dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="The build's: vectors hold twice as many channels in float16."),
    ] = "float32",
) -> None:
    """Show, layer by layer, in which units frames, channels and positions can be left out, and the time that saves.

    Times are predicted by the model that chooses kernels, not measured: at all units of an axis and at half of them.
    Sites, where DANCE masks activations, take units that suit the layers before them; only networks of the zoo have
    sites.
    """
    from dance_tvm.compiler.requests import require_buildable
    from dance_tvm.machines.target import load_target
    from dance_tvm.models.network_files import require_network
    from dance_tvm.models.registry import names

    machine = load_target(target)
    if out is not None and model not in names():
        raise DanceError(f"--out takes the units of sites, which only networks of the zoo have: {', '.join(names())}")
    require_network(model)
    require_buildable(machine, dtype)
    if machine.gpu is not None:
        raise DanceError(f"{machine.name} is a GPU, whose kernels list single frames and channels: units are for CPUs")
    if out is not None:
        require_suffix(out, "--out", (".json",))
        require_writable(out, "--out")
    count = threads or machine.threads
    with Progress(as_json) as progress:
        progress.phase("lower")
        lowered = _lowered(model, machine, count, dtype, memory)
        workloads = _convolutions(model, lowered)
        progress.phase("predict")
        found = _served(workloads, lowered)
        try:
            sites = _sites(model, machine.name, count, workloads, found) if model in names() else None
        except DanceError:  # a network of the zoo without 3D convolutions has no sites
            if out is not None:
                raise
            sites = None
    if out is not None and sites is not None:
        from dance_tvm.sparsity.units import write_units

        write_units(sites, out)
    if as_json:
        listed = {name: served[:kernels] for name, served in found.items()}
        typer.echo(json.dumps(_facts(model, machine.name, count, listed, sites), indent=2))
        return
    print_tables([_of_layers(found, kernels or 1), *([_of_sites(sites)] if sites else [])])


def _lowered(model: str, machine: Target, threads: int, dtype: Dtype, memory: Memory) -> Lowered:
    from dance_tvm.compiler.pipeline import Options, lower
    from dance_tvm.frontend import import_model

    options = Options(threads=threads, dtype=dtype, memory=memory)
    return lower(import_model(model, check=False).mod, machine, options)


def _convolutions(model: str, lowered: Lowered) -> dict[str, Workload]:
    """What each convolution's kernel is chosen for, by the layer's name."""
    from dance_tvm.schedules.workload import POOL

    found = {
        name: workload
        for name, workload in lowered.workloads.items()
        if workload.family != POOL and workload.window.positions_out > workload.window.batch
    }
    if not found:
        raise DanceError(f"{model} has no convolution whose frames, channels or positions could be left out")
    return found


def _served(workloads: dict[str, Workload], lowered: Lowered) -> dict[str, list[Serving]]:
    """The kernels that could serve each layer, the best first."""
    from dance_tvm.schedules.cpu.units import servings
    from dance_tvm.schedules.layer import UNLIMITED

    assert lowered.machine is not None
    limits, facts = lowered.limits, lowered.machine
    return {name: servings(workload, facts, limits.get(name, UNLIMITED)) for name, workload in workloads.items()}


def _sites(
    model: str, target: str, threads: int, workloads: dict[str, Workload], found: dict[str, list[Serving]]
) -> Units:
    from dance_tvm import models
    from dance_tvm.schedules.cpu.units import SHARES
    from dance_tvm.sparsity.dance.site_units import layer_times, site_units
    from dance_tvm.sparsity.units import Units

    chosen = {name: kernels[0] for name, kernels in found.items()}
    given = (models.create(model), models.entry(model).input_shape, workloads, chosen)
    return Units(
        network=model,
        target=target,
        threads=threads,
        sites=tuple(site_units(*given)),
        live_shares=SHARES,
        layers=tuple(layer_times(*given)),
    )


def _facts(
    model: str, target: str, threads: int, found: dict[str, list[Serving]], sites: Units | None
) -> dict[str, Any]:
    from dance_tvm.schedules.cpu.units import SHARES

    layers = [{"layer": name, "kernels": [asdict(kernel) for kernel in kernels]} for name, kernels in found.items()]
    facts = {"network": model, "target": target, "threads": threads, "live_shares": SHARES, "layers": layers}
    return facts | {"sites": [site.model_dump() for site in sites.sites] if sites else None}


def _of_layers(found: dict[str, list[Serving]], kernels: int) -> Table:
    from dance_tvm.schedules.cpu.units import AXES, SHARES

    half = SHARES.index(0.5)
    heads = ["layer", "kernel", "frames", "channels", "positions", "ms"]
    rows = []
    for name, served in found.items():
        for kernel in served[:kernels]:
            frames, channels, (height, width) = kernel.units
            saved = [f"{times[0] / times[half]:.2f}" for times in (kernel.seconds[axis] for axis in AXES)]
            units = [str(frames), str(channels), f"{height}×{width}"]
            rows.append([name, kernel.kernel, *units, f"{1e3 * kernel.dense_seconds:.3g}", *saved])
    return Table(
        [*heads, *(f"½ {axis}" for axis in AXES)],
        rows,
        title="units that each layer's kernel can leave out, and how many times as fast half of them is predicted, "
        "read and written",
    )


def _of_sites(sites: Units) -> Table:
    rows = []
    for site in sites.sites:
        frames, channels, (height, width) = site.counts
        shape = "×".join(map(str, site.shape))
        units = [str(site.frames), str(site.channels), "×".join(map(str, site.positions))]
        rows.append([site.node, shape, *units, f"{frames} + {channels} + {height}×{width}"])
    heads = ["site", "channels×frames×height×width", "frames", "channels", "positions", "decisions"]
    return Table(heads, rows, title="units of the sites that DANCE masks")


if __name__ == "__main__":
    start(app, "python -m dance_tvm.units")
