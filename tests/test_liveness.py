"""Masks in networks: what is none, what they leave unread, and that nothing left in memory reaches a result."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor, nn
from torch.nn import functional as F
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.ir.graph import Graph
from dance_tvm.liveness.expressions import Both, Either, Factor, Joined, Part, both, early, either, grown, nodes
from dance_tvm.liveness.relax_graph import liveness_of
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.geometry import Window


def compiled(network: nn.Module, *inputs: Tensor) -> tuple[Lowered, relax.VirtualMachine]:
    target = load_target("host")
    mod = from_exported_program(torch.export.export(network.eval(), inputs))
    lowered = lower(mod, target, Options(conv="direct"))
    return lowered, relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(1)), tvm.cpu())


def run(machine: relax.VirtualMachine, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    return [item.numpy() for item in machine["main"](*(tvm.runtime.tensor(value.numpy()) for value in inputs))]


def agrees(network: nn.Module, machine: relax.VirtualMachine, *inputs: Tensor) -> None:
    """The results are PyTorch's in float64, though every buffer held NaN before."""
    run(machine, [torch.full_like(inputs[0], float("nan")), *(torch.ones_like(mask) for mask in inputs[1:])])
    found = run(machine, inputs)
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(*(value.double() for value in inputs))
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        scale = float(other.abs().max()) or 1.0
        np.testing.assert_allclose(one / scale, other.numpy() / scale, rtol=0, atol=2e-5, err_msg=f"result {place}")


class Branches(nn.Module):
    """For each function of (x, mask): a convolution, the function, a convolution."""

    def __init__(self, functions: Sequence[Callable[[Tensor, Tensor], Tensor]], positive: bool = False) -> None:
        super().__init__()
        self.functions = functions
        self.before = nn.ModuleList(nn.Conv3d(3, 8, 3, padding=1) for _ in functions)
        self.behind = nn.ModuleList(nn.Conv3d(8, 4, 3, padding=1, bias=False) for _ in functions)
        with torch.no_grad():
            for conv in self.before:
                if positive:  # so that logarithms and roots are finite where they are computed
                    conv.weight.abs_()
                    conv.bias.abs_().add_(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.before, self.functions, self.behind, strict=True)
        return tuple(behind(function(before(x), mask)) for before, function, behind in pairs)


def bits(mask: Tensor) -> Tensor:
    return (mask > 0).to(mask.dtype)


NO_MASKS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, m: torch.relu(x) * bits(m).clamp(0.5, 2),
    lambda x, m: torch.relu(x) * bits(m).clamp(-1, 0.25),
    lambda x, m: torch.relu(x) * (2 - bits(m)),
    lambda x, m: torch.relu(x) * (bits(m) - 0.5),
    lambda x, m: torch.relu(x) * (bits(m) + bits(m.flip(1))),
    lambda x, m: torch.relu(x) * m.sigmoid().clamp(0.25, 1).round().clamp(0.25, 1),
    lambda x, m: torch.where(m > 0, x, x),
    lambda x, m: torch.where(m > 0, x, x.relu()),
    lambda x, m: torch.where(m > 0, x * bits(m), x),
    lambda x, m: torch.relu(x) * torch.where(m > 0, 1.0, 0.5),
    lambda x, m: torch.relu(x) * m.sigmoid(),
    lambda x, m: torch.relu(x) * (m * bits(m)),
    lambda x, m: torch.relu(x) * F.one_hot((m > 0).flatten().long(), 2)[None, :, None, None, :1].to(x.dtype).mul(3.0),
    lambda x, m: torch.sigmoid(x * bits(m)),
    lambda x, m: torch.maximum(x * bits(m), x - 1),
    lambda x, m: F.max_pool3d(x * bits(m) - 1, 2, 1, 1)[:, :, :-1, :-1, :-1],
    lambda x, m: F.softmax(x * bits(m), 1),
    lambda x, m: x * bits(m) / (x * bits(m)).pow(2).mean((2, 3, 4), keepdim=True).add(1).sqrt(),
]

MASKS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, m: torch.relu(x) * (bits(m) == bits(m.flip(1))).to(x.dtype),
    lambda x, m: torch.relu(x) * ((m > 0) != (m.flip(1) > 0)).to(x.dtype),
    lambda x, m: torch.relu(x) * torch.where(m > 0, bits(m.flip(1)), 1 - bits(m)),
    lambda x, m: torch.relu(x) * ((m > 0) * (m.flip(1) > 0)).to(x.dtype),
    lambda x, m: torch.where(m > 0, x, 0.0),
    lambda x, m: torch.relu(x) * m.sigmoid().round(),
    lambda x, m: torch.relu(x) * m.clamp(0, 1).ceil(),
    lambda x, m: torch.relu(x) * bits(m).sqrt().abs().relu(),
    lambda x, m: torch.relu(x) * bits(m).flatten().reshape(1, 8, 1, 1, 1),
    lambda x, m: torch.relu(x) * bits(m).clamp(0, 1),
]

#: Before a mask: what is left uncomputed must not come back as NaN.
BEFORE_MASKS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, m: torch.log(x) * bits(m),
    lambda x, m: torch.rsqrt(x) * bits(m),
    lambda x, m: torch.sqrt(x - 0.05) * bits(m),
    lambda x, m: (3 / x) * bits(m),
    lambda x, m: (x.roll(1, 1) / x) * bits(m),
    lambda x, m: torch.reciprocal(x) * bits(m),
    lambda x, m: x.pow(-0.5) * bits(m),
    lambda x, m: torch.log(torch.relu(x) + 0.0) * bits(m),
    lambda x, m: torch.exp(torch.log(x)) * bits(m),
    lambda x, m: F.softplus(x).log() * bits(m),
    lambda x, m: torch.where(m > 0, x.log(), 0.0),
]


@pytest.mark.parametrize("functions", [NO_MASKS, MASKS], ids=["none", "masks"])
def test_what_is_and_what_is_no_mask(functions: list[Callable[[Tensor, Tensor], Tensor]]) -> None:
    torch.manual_seed(3)
    x, mask = torch.randn(1, 3, 3, 4, 4), torch.randn(1, 8, 1, 1, 1)
    network = Branches(functions)
    lowered, machine = compiled(network, x, mask)
    agrees(network, machine, x, mask)
    behind = [layer for layer in lowered.layers if "input channels" in layer.skips]
    assert len(behind) == (len(functions) if functions is MASKS else 0)
    if functions is MASKS:
        assert all("output channels" in layer.skips for layer in lowered.layers if layer not in behind)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1, 1), (1, 1, 3, 1, 1)], ids=["channels", "frames"])
def test_unread_places_make_no_nan(shape: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    x, mask = torch.rand(1, 3, 3, 4, 4) + 0.1, torch.randn(shape)
    network = Branches(BEFORE_MASKS, positive=True)
    _, machine = compiled(network, x, mask)
    agrees(network, machine, x, mask)
    agrees(network, machine, x, torch.full(shape, -1.0))


class ToOnePosition(nn.Module):
    """A mask of frames where a pool leaves one position, which a padded convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, (1, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (self.behind(F.avg_pool3d(torch.relu(self.before(x)), (1, 4, 4)) * bits(mask)),)


def test_a_mask_of_frames_stays_one_where_a_single_position_is_left() -> None:
    torch.manual_seed(5)
    network, x, mask = ToOnePosition(), torch.randn(1, 3, 5, 4, 4), torch.randn(1, 1, 5, 1, 1)
    lowered, machine = compiled(network, x, mask)
    agrees(network, machine, x, mask)
    assert all(layer.skips for layer in lowered.layers if layer.kind.startswith("conv"))


WINDOW = Window(1, (8, 6, 6), (8, 6, 6), (3, 3, 3), padding=(1, 1, 1))


def factor(name: str, frames: int = 8) -> Factor:
    return Factor(name, (1, frames, 1, 1, 1))


def test_equal_expressions_are_one() -> None:
    a, b = factor("a"), factor("b")
    assert factor("a") is a
    assert Both(a, b) is Both(factor("a"), factor("b"))
    assert both(a, a) is a
    assert either(a, Both(a, b)) is a
    assert both(a, Either(a, b)) is a
    assert either(grown(a, WINDOW, True), a) is grown(a, WINDOW, True)
    assert both(grown(a, WINDOW, False), a) is a
    strided = Window(1, (8, 6, 6), (4, 6, 6), (3, 1, 1), (2, 1, 1), (1, 0, 0))
    assert isinstance(
        either(grown(factor("c", 16), Window(1, (16, 6, 6), (8, 6, 6), (2, 1, 1), (2, 1, 1)), True), a), Either
    )
    assert grown(a, strided, True).shape == (1, 4, 1, 1, 1)


def test_what_is_not_known_yet_is_left_out() -> None:
    a, b = factor("a"), factor("b")
    assert early(Both(a, b), {"a"}) is a
    assert early(Either(a, b), {"a"}) is None
    assert early(grown(Both(a, b), WINDOW, True), {"b"}) is grown(b, WINDOW, True)
    channels = Factor("c", (1, 1, 1, 1, 4))
    assert early(Joined(((channels, 4), (Factor("d", (1, 1, 1, 1, 2)), 2))), {"c"}) is Joined(
        ((channels, 4), (None, 2))
    )
    assert early(Part(channels, 0, 2), set()) is None


def residual(blocks: int) -> Graph:
    """Blocks of two convolutions and a shortcut, in front of a mask of frames."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 8, 6, 6, 4], "float32"))
    mask = relax.Var("m", relax.TensorType([1, 8, 1, 1, 1], "float32"))
    weight = relax.const(np.ones((4, 4, 3, 3, 3), "float32"))
    layout = {"data_layout": "NDHWC", "kernel_layout": "OIDHW", "out_layout": "NDHWC"}
    with builder.function("main", [x, mask]):
        with builder.dataflow():
            value, alive = x, builder.emit(relax.op.greater(mask, relax.const(0.0)))
            alive = builder.emit(relax.op.astype(alive, "float32"))
            for _ in range(blocks):
                inner = value
                for _ in range(2):
                    inner = builder.emit(relax.op.nn.conv3d(inner, weight, padding=[1, 1, 1], **layout))
                    inner = builder.emit(relax.op.nn.relu(inner))
                value = builder.emit(relax.op.add(inner, value))
            output = builder.emit_output(builder.emit(relax.op.multiply(value, alive)))
        builder.emit_func_output(output)
    return Graph.of(builder.finalize()["main"])


def test_masks_grow_with_depth_and_not_faster() -> None:
    """What a mask leaves of the first of many blocks takes as many steps to compute as there are blocks."""
    sizes, began = [], time.process_time()
    for blocks in (40, 80):
        graph = residual(blocks)
        liveness = liveness_of(graph)
        first = liveness.wanted(next(var for var in graph.order if graph.op(var) == "nn.conv3d"))
        assert first.frames is not None
        sizes.append(len(list(nodes(first.frames))))
    assert sizes[1] <= 2.1 * sizes[0] <= 2.1 * 8 * 40
    assert time.process_time() - began < 60
