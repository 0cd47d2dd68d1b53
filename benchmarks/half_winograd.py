"""What half precision would cost inside a Winograd kernel: errors of tiles beside what they save.

    python -m benchmarks.half_winograd --channels 256

Nothing is built: NumPy computes a 1×3×3 layer as a kernel would, with transforms in float32, and with what is
transformed rounded to half precision. Products are added up in float32, or in half precision and put into float32 as
often as our kernels do. Inputs are rectified and normal, weights He-scaled; errors are of the largest output, beside
float64. Multiplications are those of whole vectors, as a share of the direct layer's in float32.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.schedules.cpu.tiles import HALF_TERMS
from dance_tvm.schedules.cpu.winograd_transforms import matrices

TAPS = 3
TILES = (2, 3, 4, 5, 6)


def summed(v: np.ndarray, u: np.ndarray, terms: int) -> np.ndarray:
    """``Σ_channel v[ξ, tile, channel] · u[ξ, channel, oc]`` in float32, or in half precision by passes of ``terms``."""
    if not terms:
        return np.matmul(v.astype("float32"), u.astype("float32"))
    total = np.zeros((*v.shape[:2], u.shape[2]), "float32")
    for first in range(0, v.shape[2], terms):
        sums = np.zeros_like(total)
        for channel in range(first, min(first + terms, v.shape[2])):
            product = v[:, :, channel, None].astype("float32") * u[:, channel, None].astype("float32")
            sums = (sums + product).astype("float16").astype("float32")  # a fused multiply-add of halves
        total += sums
    return total


def errors(m: int, channels: int, outputs: int, tiles: int, terms: int) -> tuple[float, ...]:
    """Of tiles of m × m outputs: all in float32, transformed data in half precision, products too."""
    rng, (a, g, b) = np.random.default_rng(0), (np.asarray(each, "float64") for each in matrices(m, TAPS))
    x = np.maximum(rng.standard_normal((tiles, channels, m + TAPS - 1, m + TAPS - 1)), 0).astype("float16")
    w = rng.standard_normal((outputs, channels, TAPS, TAPS)) * (2 / (channels * TAPS * TAPS)) ** 0.5
    u, v = np.einsum("ij,ocjk,lk->ilco", g, w, g), np.einsum("ij,tcjk,lk->iltc", b, x.astype("float64"), b)
    points = (m + TAPS - 1) ** 2
    u, v = u.reshape(points, channels, outputs), v.reshape(points, tiles, channels)

    def result(products: np.ndarray) -> np.ndarray:
        square = products.reshape(m + TAPS - 1, m + TAPS - 1, tiles, outputs)
        return np.einsum("ij,jkto,lk->toil", a, square.astype("float64"), a)

    exact = result(np.matmul(v, u))
    found = [summed(v.astype(kind), u.astype(kind), terms * in_half) for kind, in_half in KINDS]
    return tuple(float(np.abs(result(each) - exact).max() / np.abs(exact).max()) for each in found)


#: How what is transformed is stored, and whether products are added up in half precision.
KINDS = (("float32", False), ("float16", False), ("float16", True))


def main(
    channels: Annotated[int, typer.Option(help="input channels")] = 256,
    outputs: Annotated[int, typer.Option(help="output channels")] = 64,
    tiles: Annotated[int, typer.Option(help="tiles of outputs")] = 64,
    terms: Annotated[int, typer.Option(help="products until sums are put into float32")] = HALF_TERMS,
) -> None:
    """Print errors and multiplications of each tile."""
    table = Table("tile", "float32", "stored in half", "and added up in half", "multiplies", "in half")
    for m in TILES:
        found = errors(m, channels, outputs, tiles, terms)
        share = (m + TAPS - 1) ** 2 / (m * TAPS) ** 2
        table.add_row(f"1×{m}×{m}", *(f"{error:.1e}" for error in found), f"{share:.2f}", f"{share / 2:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
