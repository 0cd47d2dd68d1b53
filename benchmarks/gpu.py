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
from pathlib import Path
from typing import Annotated

import typer

from dance_tvm.core.cli import plain_errors
from dance_tvm.machines.target import load_target

from . import gpu_export
from .gpu_static import Standing, fill, table_of, write
from .gpu_timing import on_gpu

STATIC_TARGETS = ("jetson-nano", "jetson-orin-nano")
NETWORKS = ("c3d", "r2plus1d-18")


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
            write(out, json.dumps(on_gpu(rounds), indent=1))


if __name__ == "__main__":
    typer.run(main)
