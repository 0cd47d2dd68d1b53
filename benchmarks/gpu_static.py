"""What NVIDIA's compiler says of GPU kernels, without a GPU: `python -m benchmarks.gpu --static`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dance_tvm.artifact.device_code import assemble, compile_ptx
from dance_tvm.device.launches import device_code
from dance_tvm.machines.target import Gpu, Target
from dance_tvm.schedules.kernel import Kernel

from .gpu_timing import block_conv
from .kernels import C3D, Layer, Masks

#: A warp gets its registers, a block its shared memory (bytes), in lots of this size (CUDA occupancy calculator).
REGISTER_LOT, SHARED_LOT, MOST_BLOCKS = 256, 256, 32


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


def write(path: Path | None, text: str) -> None:
    """Replace the file, if there is to be one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)


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
