"""Names of fused functions: short enough for a file, still different, and called by what they are called now."""

from __future__ import annotations

import numpy as np
import torch
import tvm
from torch import nn
from tvm import relax, tirx
from tvm.relax.frontend.torch import from_exported_program

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.machines.target import load_target
from dance_tvm.transform.short_names import LONGEST, short_name


class Turned(nn.Module):
    """Many operators of one element each, which are fused into one function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in range(20):
            x = torch.cat([x[:, 1:], x[:, :1]], 1) * 0.5 if step % 2 else torch.flip(x, (1,)) + step
        return x


def names(mod: tvm.IRModule) -> list[str]:
    return [name.name_hint for name, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)]


def test_functions_fused_of_many_operators_keep_short_names():
    network, x = Turned(), torch.randn(2, 5, 3)
    for target in ("host", "opencl"):
        lowered = lower(from_exported_program(torch.export.export(network, (x,))), load_target(target), Options())
        assert names(lowered.mod)
        assert all(len(name) <= LONGEST for name in names(lowered.mod))
    lowered = lower(from_exported_program(torch.export.export(network, (x,))), load_target("host"), Options())
    machine = relax.VirtualMachine(tvm.compile(lowered.mod, load_target("host").tvm_target(1)), tvm.cpu())
    np.testing.assert_allclose(machine["main"](tvm.runtime.tensor(x.numpy()))[0].numpy(), network(x), rtol=1e-6)


def test_short_names_differ_where_long_ones_do():
    long = "fused" + "_strided_slice_concatenate" * 9
    assert len(short_name(long)) == LONGEST
    assert short_name(long) != short_name(long + "1")
    assert short_name(long).startswith("fused_strided_slice")
