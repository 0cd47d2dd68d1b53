"""NaN stays NaN as in PyTorch, through operators that compare and through what kernels apply before they store."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from torch.nn import functional
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program
from tvm.script import relax as R

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend import import_model
from dance_tvm.machines.target import load_target
from dance_tvm.transform.keep_nan import KEEP_NAN
from tests.test_transform import integers, outputs

OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "relu6": functional.relu6,
    "hardtanh": functional.hardtanh,
    "clamp from above": lambda x: x.clamp_max(0.5),
    "clamp by tensors": lambda x: torch.clamp(x, torch.zeros(1), torch.ones(6)),
    "hardsigmoid": functional.hardsigmoid,
    "hardswish": functional.hardswish,
    "elu": functional.elu,
    "leaky_relu": functional.leaky_relu,
    "softplus": functional.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "maximum, NaN on the left": lambda x: torch.maximum(x, x[:1].nan_to_num()),
    "maximum, NaN on the right": lambda x: torch.maximum(x[..., :1].nan_to_num(), x),
    "minimum": lambda x: torch.minimum(x, torch.ones(6)),
    "largest of a row": lambda x: x.amax(-1),
    "smallest of a picture": lambda x: x.amin((2, 3), keepdim=True),
    "largest of all": lambda x: x.amax(),
    "max pool": lambda x: functional.max_pool2d(x, 3, 2, 1),
    "adaptive max pool": lambda x: functional.adaptive_max_pool2d(x, (3, 2)),
    "softmax": lambda x: x.softmax(1),
    "not equal to itself": lambda x: (x != x).float(),
    "equal to itself": lambda x: (x == x).float(),
    "unequal to a number": lambda x: (x != 1).float(),
    "unequal to another": lambda x: (x != x.flip(1)).float(),
    "not zero": lambda x: torch.where(x != 0, x, 0),
    "above": lambda x: (x > 0).float(),
}


class All(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(operator(x) for operator in OPERATORS.values())


def test_operators_keep_nan_where_pytorch_does() -> None:
    x = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(5))
    low = lower(import_model(All().eval(), example_inputs=(x,)).mod, load_target("host"), Options())
    machine = relax.VirtualMachine(tvm.compile(low.mod, target=load_target("host").tvm_target(1)), tvm.cpu())
    x[0, 1, 2, 3] = x[1, 3, 6, 5] = x[1, 0, 0, 1] = torch.nan
    for name, found, wanted in zip(OPERATORS, outputs(machine, x), All()(x), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


class Epilogues(nn.Module):
    """Convolutions with each kind of what a kernel applies to its results."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(3, 9, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        relu, relu6, silu, added = (layer(x) for layer in self.layers)
        return torch.relu(relu), functional.relu6(relu6), functional.silu(silu), torch.relu(added + x[:, :1])


def test_fused_activations_keep_nan() -> None:
    network = integers(Epilogues())
    x = torch.randint(-4, 5, (1, 3, 2, 4, 5)).float()
    mod = from_exported_program(torch.export.export(network, (x,)))
    low = lower(mod, load_target("host"), Options(conv="direct"))
    machine = relax.VirtualMachine(tvm.compile(low.mod, target=load_target("host").tvm_target(1)), tvm.cpu())
    x[0, 2, 1, 3, 3] = torch.nan
    for found, wanted in zip(outputs(machine, x), network(x), strict=True):
        assert torch.isnan(wanted).any()
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)


def legalized(dtype: str, call: Callable[[relax.Expr], relax.Expr]) -> str:
    builder = relax.BlockBuilder()
    x = relax.Var("x", R.Tensor((4, 6), dtype))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(call(x)))
    return str(relax.transform.LegalizeOps(KEEP_NAN)(builder.finalize()).script())


@pytest.mark.parametrize(
    "call", [relax.op.nn.relu, lambda x: relax.op.clip(x, -1, 6), lambda x: relax.op.maximum(x, x)]
)
def test_floats_are_compared_and_chosen_and_integers_left_to_tvm(call) -> None:
    floats, integers_ = legalized("float32", call), legalized("int32", call)
    assert "T.Select" in floats
    assert "T.max" not in floats
    assert "T.max" in integers_
