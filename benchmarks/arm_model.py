"""What half precision saves on Arm processors: instructions counted in emulation, cycles predicted from LLVM's models.

    python -m benchmarks.arm_model networks --json FILE      instructions of one call, float32 beside float16
    python -m benchmarks.arm_model networks --only transnetv2 --frames 10       on a clip of so many frames
    python -m benchmarks.arm_model layers                    the same of single layers, per multiply-add
    python -m benchmarks.arm_model masks                     speed-up over dense ÷ reduction, in instructions, by type
    python -m benchmarks.arm_model pruned                    the same of weights pruned by KGS and by slices
    python -m benchmarks.arm_model dstep                     the same of D-STEP's decisions
    python -m benchmarks.arm_model peers --json FILE         networks in ONNX Runtime's and MNN's aarch64 wheels
    python -m benchmarks.arm_model kernels                   cycles per multiply-add of each kernel's inner loop

Instructions are the same at every run; they need the emulated device (`dance-tvm doctor`). Cycles are *predicted*: the
innermost loop of the assembly through `llvm-mca` of LLVM 19 or newer (Debian's package llvm-19) on scheduling models of
processors, every load a hit in the first-level cache. X3D-XS needs pytorchvideo. MNN is asked with precision low, for
which it computes in half precision, and with precision high.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import torch
import tvm
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from dance_tvm import models
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.device import prepare_emulator
from dance_tvm.device.emulator import prepare
from dance_tvm.lowering.machine import machine_of
from dance_tvm.lowering.registry import choose
from dance_tvm.machines.target import load_target
from dance_tvm.models.macs import count as count_macs
from dance_tvm.models.resnet import VideoResNet
from dance_tvm.schedules.elementary import written_out
from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.layer import Layer
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate
from dance_tvm.sparsity.units import read_units
from dance_tvm.units import units as units_command

from .emulated_peers import EmulatedPeers
from .engines import export_case
from .instructions import instructions
from .published.networks import NETWORKS
from .random_policies import Mix, example_clip, needed_share, with_mix
from .slices import SCHEMES
from .units import CASES, drawer, masked

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Dtype = Literal["float32", "float16"]
Conv = Literal["direct", "auto"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16")
#: What each network is built as, the one that the others are compared with first.
BUILDS: tuple[tuple[Dtype, Conv], ...] = (
    ("float32", "direct"),
    ("float32", "auto"),
    ("float16", "auto"),
)
#: Groups that networks are pruned in for each type: filters fill two vectors, channels one.
GROUPS: dict[Dtype, tuple[int, int]] = {"float32": (8, 4), "float16": (16, 8)}
#: What D-STEP's policies decide.
MIXES = {
    "all computed": Mix(1.0, 1.0, 0.0),
    "tiles": Mix(0.5, 1.0, 0.0),
    "channels": Mix(1.0, 0.5, 0.25),
    "tiles and channels": Mix(0.6, 0.5, 0.25),
}
#: Scheduling models, of which family of phones' cores each is, and how many multiply-add instructions Arm's guides let
#: such a core start in a cycle. LLVM has no models of these cores themselves: for cortex-a78 and cortex-x1 it takes the
#: A57's, for cortex-x2 Neoverse N2's. Its model of the A55 starts two where one is published, and is of no use here.
PROCESSORS = {
    "neoverse-n1": ("A76 to A78", 2),
    "neoverse-n2": ("A710", 2),
    "neoverse-v1": ("X1", 4),
    "neoverse-v2": ("X2, X3", 4),
}
#: As many independent multiply-adds as hide their latency.
INDEPENDENT = 24


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, and how many of them are multiply-adds of whole vectors."""

    lines: list[str]
    multiplies: int


class Row(TypedDict):
    """What of the reduction of multiply-adds became fewer instructions, in one case and type."""

    case: str
    dtype: Dtype
    share: float
    efficiency: float


@app.command("networks")
def networks(
    only: Annotated[str, typer.Option(help="comma-separated names")] = "c3d-mini,MobileNet 3D,x3d_xs",
    target: Annotated[str, typer.Option(help="what to build for; aarch64")] = "snapdragon",
    frames: Annotated[int, typer.Option(help="of a clip of TransNetV2; 0: all of its 100, which takes hours")] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print instructions of one call of each network, by type and convolution."""
    prepare_emulator()
    rows: list[dict[str, str | int | float]] = []
    for name in only.split(","):
        for dtype, conv in BUILDS:
            network, inputs = named_network(name)
            if frames and name == "transnetv2":
                inputs = tuple(clip[:, :frames] for clip in inputs)
            count = _instructions(network, inputs, dtype, conv, target)
            rows.append({"network": name, "dtype": dtype, "conv": conv, "instructions": count})
            typer.echo(f"{name} {dtype} {conv}: {rows[-1]['instructions']:,}", err=True)
            if out is not None:
                out.write_text(
                    json.dumps({"target": target, "threads": 1, "frames": frames, "rows": rows}, indent=1) + "\n",
                    "utf-8",
                )
    table = Table("network", *(f"{dtype}, {conv}" for dtype, conv in BUILDS))
    for name in only.split(","):
        counted = [float(row["instructions"]) for row in rows if row["network"] == name]
        table.add_row(name, *(f"{count / 1e6:.1f} M ({count / counted[0]:.2f})" for count in counted))
    Console().print(table)


def named_network(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A network of the zoo or of those published, and its inputs."""
    known = {network.name: network for network in NETWORKS}
    if name in known:
        network = known[name].create()
        return network, tuple(known[name].inputs(network))
    entry = models.entry(name)
    return models.pretrained(name) if entry.pretrained else models.create(name), models.example_inputs(name)


def _instructions(
    network: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    dtype: Dtype,
    conv: Conv,
    target: str,
    given: Sequence[torch.Tensor] = (),
) -> int:
    """Of one call of the network, built now, on the inputs ``given``, else on random ones."""
    options = Options(threads=1, dtype=dtype, conv=conv)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "network"
        built = build_network(network, place, target=target, example_inputs=inputs, options=options, check=False)
        names = [tensor.name for tensor in built.artifact.manifest.inputs]
        arrays = [dict(zip(names, (each.numpy() for each in given), strict=True))] if given else []
        return instructions(built.artifact, arrays)[0]


@app.command("layers")
def layers(target: Annotated[str, typer.Option(help="what to build for; aarch64")] = "snapdragon") -> None:
    """Print instructions per multiply-add of some layers, built alone with --conv direct."""
    prepare_emulator()
    table = Table("layer", "float32", "float16")
    for name, layer in _layers():
        if layer.columns is not None:
            continue
        window, channels = layer.window, layer.channels_in
        torch.manual_seed(0)
        sizes = (window.kernel, window.stride, window.padding)
        module = nn.Sequential(nn.Conv3d(channels, layer.channels_out, *sizes, groups=layer.groups), nn.ReLU()).eval()
        clip = torch.randn(window.batch, channels, *window.size)
        macs = window.tap_positions * layer.channels_out * channels / layer.groups
        counts = [_instructions(module, (clip,), dtype, "direct", target) / macs for dtype in DTYPES]
        table.add_row(name, *(f"{count:.4f}" for count in counts))
    Console().print(table)


@app.command("masks")
def masks(
    name: Annotated[str, typer.Option("--network", help="a network of the zoo with sites")] = "c3d-mini",
    target: Annotated[str, typer.Option(help="what to build for; aarch64")] = "snapdragon",
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print, for masks in a type's units, speed-up over its dense network ÷ reduction of multiply-adds."""
    prepare_emulator()
    _report([row for dtype in DTYPES for row in _masked_rows(name, dtype, target)], name, target, out)


def _report(rows: Sequence[Row], name: str, target: str, out: Path | None) -> None:
    table = Table("case", *(head for dtype in DTYPES for head in (f"MACs left, {dtype}", dtype)), "float16 ÷ float32")
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [row for row in rows if row["case"] == case]
        figures = [figure for row in cells for figure in (f"{row['share']:.2f}", f"{row['efficiency']:.3f}")]
        table.add_row(case, *figures, f"{cells[1]['efficiency'] / cells[0]['efficiency']:.2f}")
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps({"target": target, "network": name, "rows": rows}, indent=1) + "\n", "utf-8")


def _row(case: str, dtype: Dtype, share: float, dense: int, count: int) -> Row:
    typer.echo(f"{case} {dtype}: {count:,} of {dense:,}, {share:.3f} left", err=True)
    return {"case": case, "dtype": dtype, "share": share, "efficiency": dense / count * share}


def _masked_rows(name: str, dtype: Dtype, target: str) -> Iterator[Row]:
    """Each case of masks in one type: the share of multiply-adds that they leave, and what of it is saved."""
    network, (clip,) = models.create(name).eval(), models.example_inputs(name)
    graph, _ = masked(network, models.entry(name).input_shape)
    with tempfile.TemporaryDirectory() as folder:
        units = Path(folder) / "units.json"
        units_command(name, target, 1, 1, units, dtype=dtype)
        draw = drawer(name, read_units(units).sites)
        drawn = {case.name: draw.draw(case, draw.density(case), 100) for case in CASES if case.whole}
        inputs = {
            case: (clip, *(mask for site in each[1:] for mask in site if mask is not None))
            for case, each in drawn.items()
        }
        artifact = build_network(
            graph,
            Path(folder) / "masked",
            target=target,
            example_inputs=inputs["ones"],
            options=Options(threads=1, dtype=dtype),
            check=False,
        ).artifact
        names = [tensor.name for tensor in artifact.manifest.inputs]
        given = [dict(zip(names, (each.numpy() for each in of), strict=True)) for of in inputs.values()]
        dense = _instructions(network, (clip,), dtype, "auto", target)
        for case, count in zip(drawn, instructions(artifact, given), strict=True):
            yield _row(case, dtype, draw.share(drawn[case]), dense, count)


@app.command("pruned")
def pruned(
    name: Annotated[str, typer.Option("--network", help="a network of the zoo")] = "c3d-mini",
    rate: Annotated[float, typer.Option(help="how many times fewer multiply-adds are left")] = 3.6,
    target: Annotated[str, typer.Option(help="what to build for; aarch64")] = "snapdragon",
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print, for weights pruned in a type's groups, speed-up over its dense network ÷ reduction of multiply-adds."""
    prepare_emulator()
    cases = product(("direct", "auto"), DTYPES)
    _report([row for conv, dtype in cases for row in _pruned_rows(name, rate, dtype, conv, target)], name, target, out)


def _pruned_rows(name: str, rate: float, dtype: Dtype, conv: Conv, target: str) -> Iterator[Row]:
    """Each scheme in one type: the share of multiply-adds that it leaves, and what of it is saved."""
    inputs = models.example_inputs(name)
    dense = _instructions(models.create(name).eval(), inputs, dtype, conv, target)
    for scheme in SCHEMES:
        network = models.create(name).eval()
        macs = count_macs(network, *inputs)
        share = prune_to_rate(network, inputs, scheme, rate, *GROUPS[dtype]).macs / macs
        count = _instructions(network, inputs, dtype, conv, target)
        yield _row(f"{scheme}, --conv {conv}", dtype, share, dense, count)


@app.command("dstep")
def dstep(
    name: Annotated[str, typer.Option("--network", help="a ResNet of the zoo")] = "resnet-mini",
    target: Annotated[str, typer.Option(help="what to build for; aarch64")] = "snapdragon",
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print, for D-STEP's decisions, speed-up over the type's dense network ÷ reduction of multiply-adds."""
    prepare_emulator()
    _report([row for dtype in DTYPES for row in _dstep_rows(name, dtype, target)], name, target, out)


def _dstep_rows(name: str, dtype: Dtype, target: str) -> Iterator[Row]:
    """Each mix of decisions in one type: the share of multiply-adds that it leaves, and what of it is saved."""
    channels, *size = models.entry(name).input_shape
    clip = example_clip((channels, size[0], size[1], size[2]))
    dense = _instructions(models.create(name).eval(), (clip,), dtype, "auto", target)
    for case, mix in MIXES.items():
        network = with_mix(_resnet(name), clip, mix)
        count = _instructions(network, (clip,), dtype, "auto", target, [clip])
        yield _row(case, dtype, float(needed_share(network, clip)), dense, count)


def _resnet(name: str) -> VideoResNet:
    network = models.create(name).eval()
    if not isinstance(network, VideoResNet):
        raise typer.BadParameter(f"{name} is no ResNet, which D-STEP's policies are for")
    return network


@app.command("peers")
def peers(
    only: Annotated[str, typer.Option(help="comma-separated names")] = "c3d-mini,MobileNet 3D",
    engines: Annotated[str, typer.Option(help="comma-separated engines")] = "onnxruntime,mnn,mnn-half",
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print instructions of one call of each network in other engines."""
    emulated, asked = EmulatedPeers(prepare(lambda told: typer.echo(told, err=True))), engines.split(",")
    table, rows = Table("network", *asked), []
    for name in only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            network, inputs = named_network(name)
            case = export_case(name, network.eval(), list(inputs), Path(folder))
            counts = {engine: emulated.instructions(engine, case) for engine in asked}
        rows += [{"network": name, "engine": engine, "instructions": count} for engine, count in counts.items()]
        table.add_row(name, *(f"{count / 1e6:.1f} M" for count in counts.values()))
        if out is not None:
            out.write_text(json.dumps({"threads": 1, "rows": rows}, indent=1) + "\n", "utf-8")
    Console().print(table)


@app.command("kernels")
def kernels(
    target: Annotated[str, typer.Option(help="what to build for; aarch64")] = "snapdragon",
    mca: Annotated[str, typer.Option(help="llvm-mca of LLVM 19 or newer")] = "llvm-mca-19",
) -> None:
    """Print predicted cycles per multiply-add of the inner loops of some layers' kernels."""
    if shutil.which(mca) is None:
        raise typer.BadParameter(f"there is no {mca}: install LLVM's tools, or name it with --mca")
    table = Table("layer", "kernel", "instructions", *(f"{model} ({of})" for model, (of, _) in PROCESSORS.items()))
    for dtype, suffix in (("float32", "4s"), ("float16", "8h")):
        lines = [f"fmla v{index}.{suffix}, v30.{suffix}, v0.{suffix[1]}[0]" for index in range(1, INDEPENDENT + 1)]
        probe = Loop(lines, INDEPENDENT)
        rates = [f"{INDEPENDENT / _cycles(probe, model, mca):.1f} of {most}" for model, (_, most) in PROCESSORS.items()]
        table.add_row("the model's multiply-adds a cycle, of the published", dtype, "", *rates)
    for name, layer in _layers():
        for dtype in DTYPES:
            kernel, loop, lanes = _inner_loop(layer, dtype, target)
            macs = lanes * loop.multiplies
            cycles = [f"{_cycles(loop, model, mca) / macs:.4f}" for model in PROCESSORS]
            table.add_row(name, kernel, f"{len(loop.lines) / macs:.4f}", *cycles)
    Console(width=160).print(table)


def _layers() -> Iterator[tuple[str, Layer]]:
    maps, pad = (4, 14, 14), (1, 1, 1)
    for size in (maps, (8, 28, 28)):
        yield (
            f"3×3×3, 64 channels, {size[0]} × {size[1]} × {size[2]}",
            Layer(Window(1, size, size, (3, 3, 3), padding=pad), 64, 64),
        )
    yield "1×1×1, 96 channels", Layer(Window(1, maps, maps, (1, 1, 1)), 96, 96)
    yield "depthwise, 64 channels", Layer(Window(1, maps, maps, (3, 3, 3), padding=pad), 64, 64, 64)
    yield (
        "kernel groups of 8 × 8",
        Layer(Window(1, maps, maps, (3, 3, 3), padding=pad), 64, 64, group=(8, 8), columns=4608),
    )


def _inner_loop(layer: Layer, dtype: str, target: str) -> tuple[str, Loop, int]:
    """The kernel of a layer, its loop with the most multiply-adds for its length, and lanes of a multiply-add."""
    name, assembly = kernel_code(replace(layer, dtype=dtype), target)
    fullest = min(loops_of(assembly), key=lambda loop: len(loop.lines) / loop.multiplies)
    return name, fullest, 8 if dtype == "float16" else 4


def kernel_code(layer: Layer, target: str) -> tuple[str, str]:
    """The name of the direct kernel of a layer, and its assembly."""
    facts = load_target(target)
    kernel = choose(layer, machine_of(facts), "direct").kernel
    func = written_out(kernel.primfunc(one_thread=True))
    with facts.tvm_target(1), tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        built = tvm.compile(tvm.IRModule({kernel.name: func}), facts.tvm_target(1))
    return kernel.name, built.mod.inspect_source("asm")


def loops_of(assembly: str) -> Iterator[Loop]:
    """Every loop with vector multiply-adds in it."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\t[a-z]", line):
            lines.append(line.strip())
            jump = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\s.*?(\.L\w+)$", lines[-1])
            if jump and jump[1] in labels:
                body = lines[labels[jump[1]] :]
                multiplies = sum(each.startswith("fmla") for each in body)
                if multiplies >= 4:
                    yield Loop(body, multiplies)


def _cycles(loop: Loop, model: str, mca: str) -> float:
    """Cycles of one turn of the loop."""
    text = "\n".join(re.sub(r"\.L\w+", "0", line) for line in loop.lines) + "\n"
    command = [mca, "-mtriple=aarch64", f"-mcpu={model}", "-mattr=+fullfp16", "-iterations=100"]
    told = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Total Cycles:\s+(\d+)", told)
    assert found is not None
    return int(found[1]) / 100


if __name__ == "__main__":
    app()
