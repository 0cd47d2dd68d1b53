"""GPU kernels: what a compiler says of them (`--static`, needs no GPU), or how fast they are beside cuDNN.

    python -m benchmarks.gpu --static --json docs/benchmarks/gpu-static.json
    python -m benchmarks.gpu --json gpu.json            # on a machine with an NVIDIA GPU
    python -m benchmarks.gpu --export FOLDER            # for one without TVM: gpu_layers.py is run there

Statically: every kernel of C3D and R(2+1)D-18, dense, and of one layer with each kind of sparsity, compiled by NVRTC
and ptxas for a Jetson Nano and an Orin Nano: registers, shared memory, spills, and the occupancy that follows. Each is
written as soon as it is known, with a table beside the figures; a run that was ended goes on where its file stands. On
a GPU: layers against cuDNN (PyTorch, fp32 without TF32, the better of two memory formats), speed-up ÷ reduction by
axis and density, launch overhead, share of the roofline. Both sides are warm, take turns, and start from data there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.artifact.device_code import assemble, compile_ptx
from dance_tvm.core.cli import plain_errors
from dance_tvm.core.errors import DanceError
from dance_tvm.device.launches import device_code
from dance_tvm.machines.target import Gpu, Target, load_target
from dance_tvm.schedules.kernel import Kernel, Weights

from . import gpu_export
from .kernels import C3D, R2PLUS1D, Layer, Masks, calls_of

STATIC_TARGETS = ("jetson-nano", "jetson-orin-nano")
NETWORKS = ("c3d", "r2plus1d-18")
#: A warp gets its registers, a block its shared memory (bytes), in lots of this size (CUDA occupancy calculator).
REGISTER_LOT, SHARED_LOT, MOST_BLOCKS = 256, 256, 32
DENSITIES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class StaticRow:
    """One kernel for one target: what a thread and a block take, and how many threads of a unit can be busy."""

    target: str
    network: str
    function: str
    kernel: str
    ptx: str
    threads: int
    registers: int
    shared: int
    spills: int
    occupancy: float


def main(
    static: Annotated[bool, typer.Option("--static", help="ask ptxas; needs no GPU")] = False,
    network: Annotated[list[str] | None, typer.Option(help="with --static: the kernels of these networks")] = None,
    rounds: Annotated[int, typer.Option(help="times that both sides take turns")] = 10,
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
    export: Annotated[Path | None, typer.Option(help="write layers and a script to this folder")] = None,
    arch: Annotated[str, typer.Option(help="with --export: the oldest GPU that runs them")] = "sm_90",
) -> None:
    """Print the table and write the figures."""
    with plain_errors():
        if export is not None:
            written = gpu_export.export(export, gpu_export.target_of(arch), gpu_export.all_layers())
            print(f"{export}: {written / 1e6:.1f} MB")
        elif static:
            standing = Standing.at(out)
            fill(standing, [load_target(name) for name in STATIC_TARGETS], network or list(NETWORKS))
            print(table_of(standing.rows))
        else:
            write(out, json.dumps(_on_gpu(rounds), indent=1))


def write(path: Path | None, text: str) -> None:
    """Replace the file, if there is to be one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)


# -- without a GPU ----------------------------------------------------------------------------------------------------


@dataclass
class Standing:
    """What a static run has found so far; ``done`` names targets and networks that are complete."""

    path: Path | None = None
    rows: list[StaticRow] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    @staticmethod
    def at(path: Path | None) -> Standing:
        """What an unfinished run left in the file; nothing where the run came to its end."""
        if path is None or not path.exists():
            return Standing(path)
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["complete"]:
            return Standing(path)
        return Standing(path, [StaticRow(**row) for row in facts["rows"]], facts["done"])

    def functions(self, target: Target, network: str) -> set[str]:
        """Functions that have their rows."""
        return {row.function for row in self.rows if (row.target, row.network) == (target.name, network)}

    def keep(self, complete: bool = False) -> None:
        """Write the figures, and the table beside them."""
        rows = [asdict(row) for row in self.rows]
        write(self.path, json.dumps({"complete": complete, "done": self.done, "rows": rows}, indent=1))
        if self.path is not None:
            write(self.path.with_suffix(".md"), table_of(self.rows))


def fill(standing: Standing, targets: list[Target], networks: list[str]) -> None:
    """Ask ptxas about every function that has no rows yet."""
    imported: dict[str, Any] = {}
    for target in targets:
        for name, functions in units(target, networks, imported).items():
            if f"{target.name} {name}" in standing.done:
                continue
            known = standing.functions(target, name)
            for function, func in functions().items():
                if function not in known:
                    standing.rows += static_rows(name, function, func, target)
                    standing.keep()
            standing.done.append(f"{target.name} {name}")
            standing.keep()
    standing.keep(complete=True)


def units(target: Target, networks: list[str], imported: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is compiled for one target: functions of whole networks, and of a layer thinned in each way."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        network: partial(network_kernels, network, target, imported) for network in networks
    }
    for name, functions in sparse_kernels(C3D[3], target).items():
        found[f"conv3b, {name}"] = partial(dict, functions)
    return found


def network_kernels(network: str, target: Target, imported: dict[str, Any]) -> dict[str, Any]:
    """All kernels of a dense network; ``imported`` keeps networks from one target to the next."""
    from tvm import tirx

    from dance_tvm.compiler.pipeline import Options, lower
    from dance_tvm.frontend import import_model

    if network not in imported:
        imported[network] = import_model(network, check=False)
    lowered = lower(imported[network].mod, target, Options(sparsity="off"))
    functions = {name.name_hint: func for name, func in lowered.mod.functions_items()}
    return {name: func for name, func in functions.items() if isinstance(func, tirx.PrimFunc)}


def sparse_kernels(layer: Layer, target: Target) -> dict[str, dict[str, Any]]:
    """Kernels of a layer by what thins it."""
    from dance_tvm.lowering.machine import gpu_of
    from dance_tvm.schedules.gpu.conv3d_kgs import GroupConv
    from dance_tvm.schedules.gpu.tiles import default_tile

    some = np.ones((1, *layer.window.out[1:]), bool)
    inputs, outputs = np.ones(layer.channels_in, bool), np.ones(layer.channels_out, bool)
    frames = np.ones(layer.window.out[0], bool)
    thinned = {
        "positions and frames": Masks(in_frames=np.ones(layer.size[0], bool), out_frames=frames, positions=some),
        "input channels": Masks(live_in=inputs),
        "output channels": Masks(live_out=outputs),
        "all axes": Masks(np.ones(layer.size[0], bool), frames, some, inputs, outputs),
    }
    kernels: dict[str, dict[str, Any]] = {}
    for name, masks in thinned.items():
        conv = block_conv(layer, target, masks)
        kernels[name] = {each.name: each.primfunc() for each in _with_planners(conv)}
    for filters in (8, 16, 32):
        plain = block_conv(layer, target, Masks())
        gpu = gpu_of(target)
        assert gpu is not None
        tile = default_tile(gpu, layer.window, layer.channels_out, filters)
        fields = {field: getattr(plain, field) for field in plain.__dataclass_fields__}
        columns = layer.channels_out // filters * layer.channels_in * layer.window.taps // 3
        groups = GroupConv(**{**fields, "tile": tile, "live_in": True}, columns=columns)
        kernels[f"groups of {filters} filters"] = {each.name: each.primfunc() for each in _with_planners(groups)}
    return kernels


def _with_planners(kernel: Kernel) -> list[Kernel]:
    return [kernel, *(each.planner for each in kernel.lists())]


def static_rows(network: str, function: str, func: Any, target: Target) -> list[StaticRow]:
    """What ptxas says of each kernel that a function launches."""
    import tvm

    assert target.gpu is not None
    arch = str(target.tvm["arch"])
    code = device_code(tvm.IRModule({function: func}), target.tvm_target())
    threads = {each.kernel: int(np.prod(each.block)) for plan in code.plans.values() for each in plan.launches}
    rows = []
    for fact in assemble(compile_ptx(code.source, arch, target.gpu.ptx), arch):
        size = threads[fact.name]
        busy = occupancy(target.gpu, size, fact.registers, fact.shared)
        rows.append(
            StaticRow(
                target.name, network, function, fact.name, target.gpu.ptx, size, fact.registers, fact.shared,
                fact.spills, busy,
            )
        )  # fmt: skip
    return rows


def table_of(rows: list[StaticRow]) -> str:
    """A Markdown table; kernels that differ only in shapes are one line, with the hungriest of them."""
    families: dict[tuple[str, str, str], list[StaticRow]] = {}
    for row in rows:
        families.setdefault((row.target, row.network, _family(row.kernel, row.threads)), []).append(row)
    titles = (
        "target",
        "PTX",
        "network",
        "kernel",
        "variants",
        "threads",
        "registers",
        "shared, bytes",
        "spilled, bytes",
    )
    lines = [f"| {' | '.join((*titles, 'occupancy'))} |", "|" + "---|" * (len(titles) + 1)]
    for (target, network, family), alike in sorted(families.items()):
        most = max(alike, key=lambda row: (row.spills, row.registers, row.shared))
        spills = sum(row.spills for row in alike)
        cells = [target, most.ptx, network, family, len(alike), most.threads, most.registers, most.shared, spills]
        lines.append(f"| {' | '.join(map(str, cells))} | {most.occupancy:.2f} |")
    return "\n".join(lines)


def _family(kernel: str, threads: int) -> str:
    """A kernel's name without the numbers that keep names of one module apart."""
    name = re.sub(r"_kernel(_\d+)?$", "", kernel)
    if "_gpu" not in name:
        return f"elementwise, copies, reductions ({threads} threads)"
    return re.sub(r"(_t[48]x[48])\d+$", r"\1", re.sub(r"(f32|f16|gpu|_r\d|_b32)(\d*)$", r"\1", name))


def occupancy(gpu: Gpu, threads: int, registers: int, shared: int) -> float:
    """Share of a unit's threads that are busy when as many blocks as fit are there."""
    warps = -(-threads // gpu.warp)
    a_warp = -(-registers * gpu.warp // REGISTER_LOT) * REGISTER_LOT
    by_registers = gpu.registers // a_warp // warps if registers else MOST_BLOCKS
    by_shared = gpu.shared // (-(-shared // SHARED_LOT) * SHARED_LOT) if shared else MOST_BLOCKS
    by_threads = gpu.unit_threads // (warps * gpu.warp)
    return min(by_registers, by_shared, by_threads, MOST_BLOCKS) * warps * gpu.warp / gpu.unit_threads


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def block_conv(layer: Layer, target: Target, masks: Masks) -> Any:
    """The kernel of a layer with the default tile of ``target`` and the lists that ``masks`` ask for."""
    from dance_tvm.lowering.machine import gpu_of
    from dance_tvm.schedules.gpu.conv3d_gather import BlockConv
    from dance_tvm.schedules.gpu.row_plan import block_plan
    from dance_tvm.schedules.gpu.tiles import default_tile

    gpu = gpu_of(target)
    if gpu is None:
        raise DanceError(f"{target.name} has no GPU: give the name of a GPU target")
    tile = default_tile(gpu, layer.window, layer.channels_out)
    positions = None if masks.positions is None else (1, masks.positions.shape[0])
    plan = block_plan(
        layer.window, tile.mr, 1, masks.in_frames is not None, masks.out_frames is not None, positions
    )  # fmt: skip
    lists = {"live_in": masks.live_in is not None, "live_out": masks.live_out is not None}
    thinned = any(mask is not None for mask in (masks.out_frames, masks.positions, masks.live_out))
    return BlockConv(
        layer.window, layer.channels_in, layer.channels_out, 1, tile, plan, **lists,
        activation="relu", zero_dead="rows" if thinned else "",
    )  # fmt: skip


#: Runs one PrimFunc on the device: buffers in order, outputs last. Gives a function that launches and waits.
Prepare = Callable[[Any, list[Any]], Callable[[], None]]


@dataclass
class Device:
    """What a measurement needs of a device: to bring arrays there, to launch, to read seconds."""

    upload: Callable[[np.ndarray], Any]
    prepare: Prepare
    seconds: Callable[[Callable[[], None]], float]


def cuda_device(target: Target) -> Device:
    """This machine's GPU through TVM; raises DanceError where there is none."""
    import tvm

    device = tvm.device("cuda", 0)
    if not device.exist:
        raise DanceError(
            "no NVIDIA GPU here, or TVM's runtime has no CUDA: use --static, or run this where there is one"
        )

    def prepare(func: Any, buffers: list[Any]) -> Callable[[], None]:
        built = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target.tvm_target())
        return lambda: built["main"](*buffers)

    return Device(lambda array: tvm.runtime.tensor(array, device), prepare, _wall_clock(device.sync))


def opencl_device() -> Device:
    """An OpenCL device of this machine through pyopencl."""
    import tvm

    from dance_tvm.device.launches import opencl_target
    from dance_tvm.device.opencl import OpenCLSession

    session = OpenCLSession()

    def prepare(func: Any, buffers: list[Any]) -> Callable[[], None]:
        code = device_code(tvm.IRModule({"main": func}), opencl_target())
        program = session.compile(code)
        return lambda: session.run(program, code.plans["main"], buffers)

    return Device(session.upload, prepare, _wall_clock(session.queue.finish))


def _wall_clock(sync: Callable[[], None]) -> Callable[[Callable[[], None]], float]:
    import time

    def seconds(call: Callable[[], None]) -> float:
        sync()
        start = time.perf_counter()
        call()
        sync()
        return time.perf_counter() - start

    return seconds


class LayerOnGpu:
    """A layer's kernels on a device: its planners, and the convolution on random data."""

    def __init__(self, layer: Layer, target: Target, device: Device, masks: Masks | None = None) -> None:
        masks = masks or Masks()
        conv = self.conv = block_conv(layer, target, masks)
        window, self._device = conv.window, device
        rng = np.random.default_rng(0)
        x = rng.standard_normal((1, *window.size, conv.channels_in), dtype="float32")
        weight = rng.standard_normal((conv.channels_out, conv.depth, *window.kernel), dtype="float32") * 0.01
        given = {"in_frames": masks.in_frames, "out_frames": masks.out_frames, "positions": masks.positions}
        given |= {"in_channels": masks.live_in, "out_channels": masks.live_out}
        weights = Weights(weight, np.zeros(conv.channels_out, "float32"))
        calls = calls_of(conv, device.upload, x, weights, given)
        self._calls = [device.prepare(kernel.primfunc(), [*args.values()]) for kernel, args in calls]

    def seconds(self) -> float:
        """One planning and one run."""

        def both() -> None:
            for call in self._calls:
                call()

        return self._device.seconds(both)


class LayerInTorch:
    """The same layer by PyTorch (cuDNN on a GPU), the better of both memory formats."""

    def __init__(self, layer: Layer, where: str, seconds: Callable[[Callable[[], None]], float]) -> None:
        import torch

        self._seconds = seconds
        window = layer.window
        self._calls = []
        for form in (torch.contiguous_format, torch.channels_last_3d):
            x = torch.randn(1, layer.channels_in, *layer.size, device=where).to(memory_format=form)
            conv = torch.nn.Conv3d(layer.channels_in, layer.channels_out, layer.kernel, layer.stride, window.padding)
            conv = conv.to(where).to(memory_format=form).eval()
            self._calls.append(lambda conv=conv, x=x: torch.relu_(conv(x)))

    def seconds(self) -> float:
        """The better format's, in whole float32, with cuDNN's own choice of algorithm by trial."""
        import torch

        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            return min(self._seconds(call) for call in self._calls)


def compare(ours: LayerOnGpu, theirs: Any, rounds: int) -> dict[str, float]:
    """Medians of both sides, which take turns."""
    ours.seconds(), theirs.seconds()
    pairs = [(ours.seconds(), theirs.seconds()) for _ in range(rounds)]
    mine, other = (median(side) for side in zip(*pairs, strict=True))
    return {"ours": mine, "theirs": other, "share": other / mine}


def by_axis(layer: Layer, target: Target, device: Device, rounds: int) -> list[dict[str, Any]]:
    """Speed-up ÷ reduction of multiply-adds for each axis and density; planning counts."""
    dense = LayerOnGpu(layer, target, device)
    rng, rows = np.random.default_rng(0), []
    for axis in ("positions", "live_in", "live_out"):
        for density in DENSITIES:
            shape = {"positions": (1, *layer.window.out[1:]), "live_in": (layer.channels_in,)}
            mask = rng.permutation(_share(shape.get(axis, (layer.channels_out,)), density))
            thin = LayerOnGpu(layer, target, device, Masks(**{axis: mask}))
            found = compare(thin, dense, rounds)
            rows.append({"axis": axis, "density": density, **found, "efficiency": found["share"] * mask.mean()})
    return rows


def _share(shape: tuple[int, ...], density: float) -> np.ndarray:
    """A mask of which exactly the share ``density`` is alive."""
    mask = np.zeros(int(np.prod(shape)), bool)
    mask[: round(density * mask.size)] = True
    return np.random.default_rng(1).permutation(mask).reshape(shape)


def launch_overhead(device: Device) -> float:
    """Seconds of a launch that does next to nothing."""
    from dance_tvm.schedules.gpu.channel_plan import ChannelPlan

    planner = ChannelPlan(1, 1)
    call = device.prepare(planner.primfunc(), [device.upload(np.ones(o.shape, o.dtype)) for o in planner.operands()])
    call()
    return median(device.seconds(call) for _ in range(50))


def _on_gpu(rounds: int) -> dict[str, Any]:
    target = load_target("cuda")
    device = cuda_device(target)
    assert target.gpu is not None
    rows = []
    table = Table("layer", "kernel", "ms", "cuDNN ms", "of cuDNN", "of peak")
    for layer in [*C3D, *R2PLUS1D]:
        ours = LayerOnGpu(layer, target, device)
        found = compare(ours, LayerInTorch(layer, "cuda", device.seconds), rounds)
        window = layer.window
        work = 2 * window.tap_positions * layer.channels_in * layer.channels_out
        peak = work / found["ours"] / 1e9 / target.gpu.peak_gflops
        rows.append({"layer": layer.name, "kernel": ours.conv.name, **found, "peak": peak})
        times = [f"{1e3 * found['ours']:.3f}", f"{1e3 * found['theirs']:.3f}"]
        table.add_row(layer.name, ours.conv.name, *times, f"{found['share']:.2f}", f"{peak:.2f}")
    Console(width=150).print(table)
    axes = by_axis(C3D[3], target, device, rounds)
    table = Table("axis", "density", "speed-up", "÷ reduction")
    for row in axes:
        table.add_row(row["axis"], f"{row['density']}", f"{row['share']:.2f}", f"{row['efficiency']:.2f}")
    Console().print(table)
    overhead = launch_overhead(device)
    print(f"launch overhead {overhead * 1e6:.1f} us")
    return {"gpu": target.gpu.model_dump(), "layers": rows, "axes": axes, "launch_seconds": overhead}


if __name__ == "__main__":
    typer.run(main)
