"""Video and volumetric networks in time: ours beside ONNX Runtime, OpenVINO, MNN and PyTorch, float32, batch 1.

    python -m benchmarks.networks                            every network on 1 and 2 threads
    python -m benchmarks.networks --group mobile --threads 1
    python -m benchmarks.networks --only "X3D-XS|MoViNet-A0" --peers ours,onnxruntime,openvino
    python -m benchmarks.networks --profile X3D-XS           what ours spends a call on
    python -m benchmarks.networks --prepare --work FOLDER    export and build; a run with the same --work only measures

Networks are those of ``benchmarks.published`` (its requirements hold their wheels) and of the zoo, at their usual
input sizes or at the smaller ones named here. Engines and turns are those of ``engines.py``. docs/networks.md is
written from the results.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.engines import ENGINES, Case, build_ours, export_case, measure
from benchmarks.runs import table, write_runs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dance_tvm.artifact.layers import LayerInfo
    from dance_tvm.device import KernelTime

app = typer.Typer(add_completion=False, rich_markup_mode=None)
RESULTS = Path(__file__).parent / "results"
PEERS = ("ours", "pytorch", "onnxruntime", "openvino", "mnn")
TOLD_SHARE = 0.03  # kernels that take more of a call than this are told singly


@dataclass(frozen=True)
class Measured:
    """A network of ``benchmarks.published`` by its name there, or of the zoo where ``published`` is empty; ``call`` and
    ``shapes`` replace those of the table there."""

    name: str
    group: str
    published: str = ""
    shapes: str = ""
    call: str = ""

    def create(self) -> tuple[nn.Module, list[torch.Tensor]]:
        """The network and an input."""
        from benchmarks.published.networks import NETWORKS
        from dance_tvm import models

        if not self.published:
            return models.create(self.name.lower()), list(models.example_inputs(self.name.lower()))
        entry = next(entry for entry in NETWORKS if entry.name == self.published)
        entry = replace(entry, call=self.call or entry.call, shapes=self.shapes or entry.shapes)
        network = entry.create()
        return network, entry.inputs(network)


MEASURED = (
    Measured("X3D-XS", "mobile", "x3d_xs"),
    Measured("X3D-S", "mobile", "x3d_s"),
    Measured("MoViNet-A0", "mobile", "MoViNet-A0", "1x3x50x172x172"),
    Measured("MobileNet 3D", "mobile", "MobileNet 3D", "1x3x16x112x112"),
    Measured("MobileNetV2 3D", "mobile", "MobileNetV2 3D", "1x3x16x112x112"),
    Measured("ShuffleNet 3D", "mobile", "ShuffleNet 3D", "1x3x32x112x112"),
    Measured("EfficientNet-B0 3D", "mobile", "EfficientNet-B0 3D", "1x1x96x96x96"),
    Measured("TSM-MobileNetV2", "mobile", "TSM mobilenetv2_100", "1x8x3x112x112", "tsm('mobilenetv2_100', 8)"),
    Measured("TSN-MobileNetV3", "mobile", "TSN mobilenetv3_small_100", "1x8x3x224x224", "tsn('mobilenetv3_large_100')"),
    Measured("SlowFast-R50", "convolutional", "slowfast_r50", "1x3x8x256x256 1x3x32x256x256", "slowfast(50, 32, 256)"),
    Measured(
        "CSN-R101",
        "convolutional",
        "csn_r101",
        "1x3x32x224x224",
        "create_csn(model_depth=101, stem_pool=nn.MaxPool3d, head_pool_kernel_size=(4, 7, 7))",
    ),
    Measured("R(2+1)D-50", "convolutional", "r2plus1d_r50"),
    Measured("I3D", "convolutional", "I3D", "1x3x16x224x224"),
    Measured("S3D", "convolutional", "s3d"),
    Measured("MONAI UNet", "volumes", "UNet", "1x1x96x96x96"),
    Measured("SegResNet", "volumes", "SegResNet", "1x1x64x64x64"),
    Measured("nnU-Net", "volumes", "nnU-Net plain", "1x1x64x64x64"),
    Measured("UNETR", "volumes", "UNETR"),
    Measured("Swin3D-T", "attention", "swin3d_t", "1x3x8x112x112"),
    Measured("MViT-v2-S", "attention", "mvit_v2_s"),
    Measured("C3D", "heavy"),
    Measured("R2plus1D-18", "heavy"),
    Measured("TransNetV2", "heavy"),
    Measured("ResNet18-TSN", "heavy"),
)
GROUPS = tuple(dict.fromkeys(entry.group for entry in MEASURED))


@app.command()
def main(
    only: Annotated[str, typer.Option(help="A regular expression for whole names.")] = "",
    group: Annotated[str, typer.Option(help=f"One of {', '.join(GROUPS)}.")] = "",
    peers: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(ENGINES)}.")] = ",".join(PEERS),
    threads: Annotated[str, typer.Option(help="Comma-separated numbers of threads.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 15,
    work: Annotated[Path | None, typer.Option(help="Keep exported networks here, and take them from here.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for networks.json.")] = RESULTS,
    build_only: Annotated[
        bool, typer.Option("--build-only", help="Export and build what --work lacks, no more.")
    ] = False,
    profile: Annotated[str, typer.Option(help="In place of measuring: what ours spends a call of this one on.")] = "",
    prepare: Annotated[
        bool, typer.Option(help="Only export and build into --work, and measure in a later run.")
    ] = False,
) -> None:
    """Measure, print a table, and write JSON."""
    pattern = re.escape(profile) if profile else only
    chosen = [
        entry
        for entry in MEASURED
        if (not pattern or re.fullmatch(pattern, entry.name, re.IGNORECASE)) and group in ("", entry.group)
    ]
    names = [peer for peer in peers.split(",") if peer]
    if not chosen or set(names) - set(ENGINES):
        wrong = f"no network is called {pattern!r}" if not chosen else f"unknown peer in {peers}"
        known = ", ".join([*(entry.name for entry in MEASURED), *ENGINES])
        print(f"error: {wrong}: choose among {known}", file=sys.stderr)
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory(prefix="networks-") as scratch:
        for entry in chosen:
            case = _case(entry, work or Path(scratch))
            for count in (int(number) for number in threads.split(",")):
                if build_only:
                    build_ours(case, count)
                    continue
                if profile:
                    print("\n".join(_profile(case, count)))
                elif prepare:
                    build_ours(case, count)
                else:
                    runs = [measure(case, names, count, rounds, lambda text: print(text, file=sys.stderr))]
                    print(table(runs), flush=True)
                    write_runs(runs, out / "networks.json")


def _case(entry: Measured, folder: Path) -> Case:
    """The exported network: made now, or as a run before left it."""
    from dance_tvm.models import macs

    place = folder / entry.name.replace(" ", "-")
    network, inputs = entry.create()
    if (place / "expected-0.npy").exists():
        return Case(entry.name, macs.count(network, *inputs), place)
    return export_case(entry.name, network, inputs, folder)


# --- what a call is spent on ---


def _profile(case: Case, threads: int) -> Iterator[str]:
    """Kernels above TOLD_SHARE of a call, then the same time by kind of kernel."""
    from dance_tvm.benchmarking.layers import layers_run
    from dance_tvm.device import open_device

    artifact = build_ours(case, threads)
    with open_device("local") as device:
        network = device.load(artifact)
        inputs = {spec.name: value for spec, value in zip(artifact.manifest.inputs, case.inputs(), strict=True)}
        calls = network.kernels(inputs, repeats=11)
    whole = sum(call.seconds for call in calls)
    yield f"{case.name}, {threads} threads: {len(calls)} kernels, {1e3 * whole:.2f} ms in all (medians of 11 calls)"
    told = [(_work(layer, call), call) for call, layer in layers_run(artifact.manifest, calls)]
    for work, call in sorted(told, key=lambda pair: -pair[1].seconds):
        if call.seconds >= TOLD_SHARE * whole:
            figures = f"{call.seconds / whole:6.1%} {1e3 * call.seconds:8.3f} ms {call.bytes / 1e6:8.2f} MB"
            yield f"  {figures}  {call.symbol}  {work}"
    yield "by kind:"
    kinds: dict[str, list[float]] = defaultdict(list)
    for work, call in told:
        kinds[("" if work else "between: ") + re.sub(r"\d+", "", call.symbol).rstrip("_")].append(call.seconds)
    for kind, seconds in sorted(kinds.items(), key=lambda pair: -sum(pair[1])):
        if sum(seconds) >= 0.01 * whole:
            yield f"  {sum(seconds) / whole:6.1%} {1e3 * sum(seconds):8.3f} ms in {len(seconds):3} calls  {kind}"


def _work(layer: LayerInfo | None, call: KernelTime) -> str:
    """The layer that a call runs and how fast; empty where it runs none."""
    return f"{layer.name} ({layer.kind}, {layer.macs / 1e9 / max(call.seconds, 1e-9):.1f} GMAC/s)" if layer else ""


if __name__ == "__main__":
    app()
