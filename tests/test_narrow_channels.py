"""Channels that no convolution reads are taken out of the network, and of no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from dance_tvm.frontend import import_model
from dance_tvm.ir.graph import Graph, shape_of
from dance_tvm.ir.reasons import Reasons
from dance_tvm.transform.fold_batch_norm import FoldBatchNorm
from dance_tvm.transform.narrow_channels import NarrowChannels


class Residual(nn.Module):
    """Convolutions around a sum, a concatenation and a pool; channel c of the first is read where ``reads`` says."""

    def __init__(self, gone: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 6, 3, padding=1)
        self.left = nn.Conv3d(6, 6, 3, padding=1)
        self.side = nn.Conv3d(6, 4, 1)
        self.last = nn.Conv3d(10, 5, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(1, 4, parameter.shape, generator=generator))
            for name, channels in gone.items():
                self.get_submodule(name).weight[:, list(channels)] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        both = torch.relu(self.left(x) + x)
        joined = torch.cat([both, self.side(both)], 1)
        return self.last(torch.nn.functional.max_pool3d(joined, 2))


def weights_of(mod: tvm.IRModule) -> list[tuple[int, ...]]:
    graph = Graph.of(mod["main"])
    calls = [graph.call(var) for var in graph.order if graph.op(var) == "nn.conv3d"]
    return [shape_of(call.args[1])[:2] for call in calls]


def evaluate(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    compiled = tvm.compile(relax.transform.LegalizeOps()(mod), target=tvm.target.Target({"kind": "llvm"}))
    (result,) = relax.VirtualMachine(compiled, tvm.cpu())["main"](tvm.runtime.tensor(x))
    return result.numpy()


CASES = [
    # the sum joins the channels of stem and left: all their readers must ignore one before it goes
    ({"left": (1, 2), "side": (1, 2), "last": (1, 2)}, [(4, 1), (4, 4), (4, 4), (5, 8)]),
    ({"left": (1, 2), "side": (1, 2)}, [(6, 1), (6, 6), (4, 6), (5, 10)]),
    # side's own channels are read by the last convolution alone, behind the concatenation
    ({"last": (7, 9)}, [(6, 1), (6, 6), (2, 6), (5, 8)]),
    # what nobody reads at all keeps one channel
    ({"last": (6, 7, 8, 9)}, [(6, 1), (6, 6), (1, 6), (5, 7)]),
    ({}, [(6, 1), (6, 6), (4, 6), (5, 10)]),
]


@pytest.mark.parametrize(("gone", "expected"), CASES, ids=range(len(CASES)))
def test_only_unread_channels_are_taken_out(gone: dict[str, tuple[int, ...]], expected: list[tuple[int, ...]]) -> None:
    network = Residual(gone).eval()
    x = torch.randint(-2, 3, (1, 1, 2, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    imported = import_model(network, example_inputs=(x,))
    narrow = NarrowChannels(Reasons())
    folded = FoldBatchNorm(Reasons())(relax.transform.FoldConstant()(imported.mod))
    mod = narrow(folded)
    assert weights_of(mod) == expected
    assert bool(list(narrow.reasons)) == (expected != CASES[-1][1])
    np.testing.assert_array_equal(evaluate(mod, x.numpy()), network(x).detach().numpy())


def in_kernel_groups(channels_out: int, channels_in: int, seed: int) -> torch.Tensor:
    """Weights of which half of the taps of each group of 16 filters by 4 channels is zero."""
    rng = np.random.default_rng(seed)
    live = rng.permuted(np.arange(27 * channels_in // 4 * channels_out // 16) % 2, axis=0)
    spread = live.reshape(channels_out // 16, channels_in // 4, 27).repeat(16, 0).repeat(4, 1)
    values = rng.integers(1, 4, spread.shape) * spread
    return torch.from_numpy(values.astype("float32")).reshape(channels_out, channels_in, 3, 3, 3)


def test_filters_in_kernel_groups_go_by_whole_groups() -> None:
    first, second = nn.Conv3d(4, 48, 3, bias=False), nn.Conv3d(48, 16, 3, bias=False)
    with torch.no_grad():
        first.weight.copy_(in_kernel_groups(48, 4, 0))
        second.weight.copy_(in_kernel_groups(16, 48, 1))
        second.weight[:, 4:8] = 0  # a part of the first group: the others would no longer be groups without it
        second.weight[:, 32:] = 0  # the whole third group
    x = torch.randint(-2, 3, (1, 4, 5, 5, 5), generator=torch.Generator().manual_seed(1)).float()
    network = nn.Sequential(first, nn.ReLU(), second).eval()
    mod = NarrowChannels(Reasons())(relax.transform.FoldConstant()(import_model(network, example_inputs=(x,)).mod))
    assert weights_of(mod) == [(32, 4), (16, 32)]
    np.testing.assert_array_equal(evaluate(mod, x.numpy()), network(x).detach().numpy())
    with torch.no_grad():  # dense weights have no groups: each filter that nobody reads goes
        first.weight.copy_(torch.ones_like(first.weight))
        second.weight[second.weight == 0] = 1
        second.weight[:, 4:8] = 0
    mod = NarrowChannels(Reasons())(relax.transform.FoldConstant()(import_model(network, example_inputs=(x,)).mod))
    assert weights_of(mod) == [(44, 4), (16, 44)]
