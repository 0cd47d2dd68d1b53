"""The layers that video networks are made of, each family alone: ours beside ONNX Runtime and OpenVINO in float32.

    python -m benchmarks.families                          every family on one thread
    python -m benchmarks.families --only depthwise --threads 1,2
    python -m benchmarks.families --rounds 5 --out /tmp/figures

Engines, turns, ratios and errors are those of ``engines.py``; the last line is the geometric mean of ours over the
faster of the two. Every family is a few layers, so that the changes of layout at its ends weigh as in a network.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.engines import export_case, measure
from benchmarks.runs import table, write_runs

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(add_completion=False, rich_markup_mode=None)
PEERS = ("ours", "onnxruntime", "openvino")


def families() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Each family's layers and the shape of their input."""
    import torch
    from torch import nn

    class Excited(nn.Module):
        """Squeeze and excitation between two pointwise layers."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.before, self.behind = nn.Conv3d(channels, channels, 1), nn.Conv3d(channels, channels, 1)
            self.squeeze, self.excite = nn.Conv3d(channels, 8, 1), nn.Conv3d(8, channels, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.before(x)
            gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3, 4), keepdim=True)))))
            return self.behind(nn.functional.silu(y * gate))

    class Attention(nn.Module):
        """Self-attention of several heads."""

        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.inwards, self.outwards = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, tokens, width = x.shape
            split = self.inwards(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2])
            return self.outwards(y.transpose(1, 2).reshape(n, tokens, width))

    class Shuffled(nn.Module):
        """Channels of groups dealt out between two pointwise layers."""

        def __init__(self, channels: int, groups: int) -> None:
            super().__init__()
            self.groups = groups
            self.before, self.behind = nn.Conv3d(channels, channels, 1), nn.Conv3d(channels, channels, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.before(x)
            n, channels, *size = y.shape
            dealt = y.reshape(n, self.groups, channels // self.groups, *size).transpose(1, 2).reshape(y.shape)
            return self.behind(dealt)

    class Patches(nn.Module):
        """Blocks of a volume as tokens."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.project = nn.Conv3d(1, width, 16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.project(x).flatten(2).transpose(1, 2)

    def raised(layer: nn.Module) -> Callable[[], nn.Module]:
        """``layer`` makes twice the size of 64 channels, which a convolution reads."""
        return lambda: nn.Sequential(nn.Conv3d(64, 64, 1), layer, nn.Conv3d(32, 32, 1))

    def upsampled(mode: str) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(nn.Conv3d(32, 32, 1), nn.Upsample(scale_factor=2, mode=mode), nn.Conv3d(32, 16, 1))

    def depthwise(kernel: tuple[int, int, int], channels: int = 56, layers: int = 3) -> Callable[[], nn.Module]:
        padding = tuple(extent // 2 for extent in kernel)
        return lambda: nn.Sequential(
            *(nn.Conv3d(channels, channels, kernel, padding=padding, groups=channels) for _ in range(layers))
        )

    def temporal(channels: int, layers: int) -> Callable[[], nn.Module]:
        """Convolutions along time alone, each twice as far apart as the one before."""
        spread = [nn.Conv1d(channels, channels, 3, padding=2**each, dilation=2**each) for each in range(layers)]
        return lambda: nn.Sequential(
            *(part for layer in spread for part in (layer, nn.ReLU(), nn.Conv1d(channels, channels, 1)))
        )

    def behind(*rest: nn.Module) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(nn.Conv3d(24, 54, 1), *rest)

    clip, small, low = (1, 56, 8, 40, 40), (1, 24, 8, 40, 40), (1, 64, 8, 14, 14)
    return {
        "depthwise 3x3x3": (depthwise((3, 3, 3)), clip),
        "depthwise 1x3x3": (depthwise((1, 3, 3)), clip),
        "depthwise 5x1x1": (depthwise((5, 1, 1)), clip),
        "depthwise 3x3x3, few positions": (depthwise((3, 3, 3), 432), (1, 432, 4, 5, 5)),
        "groups of 4, 3x3x3": (lambda: nn.Conv3d(128, 128, 3, padding=1, groups=32), (1, 128, 4, 28, 28)),
        "pointwise, narrow": (lambda: nn.Sequential(nn.Conv3d(24, 54, 1), nn.Conv3d(54, 24, 1)), small),
        "pointwise, wide": (lambda: nn.Sequential(nn.Conv3d(216, 432, 1)), (1, 216, 4, 10, 10)),
        "SiLU": (behind(nn.SiLU()), small),
        "GELU": (behind(nn.GELU()), small),
        "Hardswish": (behind(nn.Hardswish()), small),
        "Mish": (behind(nn.Mish()), small),
        "squeeze and excitation": (lambda: Excited(56), clip),
        "instance norm": (behind(nn.InstanceNorm3d(54), nn.ReLU()), small),
        "group norm": (behind(nn.GroupNorm(6, 54), nn.ReLU()), small),
        "layer norm and MLP": (
            lambda: nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96)),
            (1, 784, 96),
        ),
        "pointwise, 1,024 channels": (lambda: nn.Sequential(nn.Conv3d(1024, 1024, 1)), (1, 1024, 4, 7, 7)),
        "attention": (lambda: Attention(192, 6), (1, 784, 192)),
        "attention in windows": (lambda: Attention(96, 3), (16, 98, 96)),
        "transposed 2x2x2, stride 2": (raised(nn.ConvTranspose3d(64, 32, 2, 2)), low),
        "transposed 3x3x3, stride 2": (raised(nn.ConvTranspose3d(64, 32, 3, 2, 1, 1)), low),
        "transposed 4x4x4, stride 2": (raised(nn.ConvTranspose3d(64, 32, 4, 2, 1)), low),
        "nearest upsampling": (upsampled("nearest"), (1, 32, 8, 20, 20)),
        "trilinear upsampling": (upsampled("trilinear"), (1, 32, 8, 20, 20)),
        "patch embedding": (lambda: Patches(192), (1, 1, 96, 96, 96)),
        "temporal convolutions": (temporal(64, 6), (1, 64, 1000)),
        "softmax": (lambda: nn.Sequential(nn.Softmax(-1)), (1, 12, 196, 196)),
        "channel shuffle": (lambda: Shuffled(48, 4), (1, 48, 8, 28, 28)),
        "max pool 3x3x3, stride 1": (lambda: nn.Sequential(nn.MaxPool3d(3, 1, 1)), (1, 192, 8, 28, 28)),
        "max pool and LeakyReLU": (behind(nn.LeakyReLU(0.1), nn.MaxPool3d(2)), small),
    }


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="A part of families' names; repeatable.")] = None,
    threads: Annotated[str, typer.Option(help="Comma-separated numbers of threads.")] = "1",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder for families.json.")] = Path("benchmarks/results"),
) -> None:
    """Measure, print a table and the geometric mean, and write JSON."""
    import torch

    wanted = only or []
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="families-") as scratch:
        for name, (make, shape) in families().items():
            if wanted and not any(part in name for part in wanted):
                continue
            torch.manual_seed(0)
            case = export_case(name, make().eval(), torch.randn(shape), Path(scratch))
            for count in (int(number) for number in threads.split(",")):
                runs.append(measure(case, PEERS, count, rounds, lambda text: print(text, file=sys.stderr)))
                print(table(runs[-1:]), flush=True)
                write_runs(runs, out / "families.json")
    if not runs:
        print(f"error: no family's name has {' or '.join(wanted)} in it", file=sys.stderr)
        raise typer.Exit(2)
    ratios = [ratio for run in runs if (ratio := over_the_faster(run)) is not None]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"ours over the faster peer: geometric mean {mean:.2f} of {len(ratios)} families")


def over_the_faster(run: dict[str, Any]) -> float | None:
    """Ours over the faster of the others, as the median of ratios within a round; None where there is none."""
    ratios = [result["ours_over_it"] for peer, result in run["peers"].items() if peer != "ours" and "ms" in result]
    return max(ratios, default=None)


if __name__ == "__main__":
    app()
