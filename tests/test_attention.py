"""Attention and products of variables as kernels of their own, against PyTorch in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from test_norms import Several, errors, on_double, run
from torch import nn

from dance_tvm.lowering import lower_attention
from dance_tvm.schedules.cpu.product import tile_for
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.kernel import Kernel

F = nn.functional


def emitted_by(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of kernels that a pass emits, in order."""
    found: list[str] = []
    emit = module.call_kernel

    def call(builder: Any, kernel: Kernel, args: Any, threads: int) -> Any:
        found.append(kernel.kind)
        return emit(builder, kernel, args, threads)

    monkeypatch.setattr(module, "call_kernel", call)
    return found


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return emitted_by(lower_attention, monkeypatch)


class Heads(nn.Module):
    """Self-attention from one projection of all heads, as vision transformers write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inwards, self.outwards = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        q, k, v = self.inwards(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.outwards(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class Windows(nn.Module):
    """Attention within windows of a volume, a bias for each pair of tokens and a mask for each window, by parts."""

    def __init__(self, width: int, heads: int, windows: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.windows = heads, windows
        self.qkv = nn.Linear(width, 3 * width)
        self.bias = nn.Parameter(torch.randn(1, heads, tokens, tokens))
        hidden = torch.rand(windows, tokens, tokens) < 0.4
        self.register_buffer("mask", torch.zeros(windows, tokens, tokens).masked_fill(hidden, -100.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (width // self.heads) ** -0.5).matmul(k.transpose(-2, -1)) + self.bias
        scores = scores.view(n // self.windows, self.windows, self.heads, tokens, tokens)
        scores = (scores + self.mask.unsqueeze(1).unsqueeze(0)).view(-1, self.heads, tokens, tokens)
        return F.softmax(scores, -1).matmul(v).transpose(1, 2).reshape(n, tokens, width)


def parted(x: torch.Tensor) -> torch.Tensor:
    """Scores divided behind the product; two heads that share keys and values."""
    q, k, v = x[:, :2], x[:, 2:3], x[:, 3:]
    return torch.softmax(q @ k.transpose(-2, -1) / 3.0, -1) @ v


def hidden(x: torch.Tensor) -> torch.Tensor:
    """A causal mask, and a row that sees nothing."""
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[4] = False
    return F.scaled_dot_product_attention(x, x.flip(1), x, attn_mask=seen)


def test_attention_is_one_kernel_and_right(emitted: list[str]) -> None:
    torch.manual_seed(0)
    module = Several(Heads(24, 3), Windows(20, 2, 3, 10), parted, hidden).eval()
    inputs = [torch.randn(2, 37, 24), torch.randn(6, 10, 20), torch.randn(2, 4, 13, 7), torch.randn(1, 2, 9, 16)]
    found, lowered = run(module, *inputs)
    for ours, truth in zip(found, on_double(module, inputs), strict=True):
        assert errors(ours, truth) < 2e-6
    assert emitted == ["attention"] * 4
    assert "permute_dims" not in lowered.mod.script(), "a projection was copied into its heads"


def test_a_softmax_that_others_read_is_left_to_products(emitted: list[str]) -> None:
    class Shown(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights = torch.softmax(x @ x.transpose(-2, -1), -1)
            return weights @ x, weights

    torch.manual_seed(0)
    x = torch.randn(3, 21, 5)
    found, _ = run(Shown(), x)
    exact = on_double(Shown(), [x])
    for ours, truth in zip(found, exact, strict=True):
        assert errors(ours, truth) < 2e-6
    assert emitted == ["product"] * 2


def test_products_of_variables(emitted: list[str]) -> None:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] @ x[:, 1].transpose(-2, -1)

    def spread(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bthc,bkc->bthk", x, x[:, 0] * 2.0)

    def one_row(x: torch.Tensor) -> torch.Tensor:
        return (x[:, :1] @ x[:, 1:].transpose(-2, -1)).transpose(0, 1)

    torch.manual_seed(0)
    module = Several(plain, spread, one_row)
    inputs = [torch.randn(2, 2, 3, 19, 33), torch.randn(2, 3, 5, 18), torch.randn(4, 30, 3)]
    found, _ = run(module, *inputs)
    for ours, truth in zip(found, on_double(module, inputs), strict=True):
        assert errors(ours, truth) < 2e-6
    assert emitted == ["product"] * 3


@pytest.mark.parametrize("machine", [Machine(4, 32, 1 << 15, 1 << 19, False), Machine(8, 16, 1 << 15, 1 << 19, True)])
def test_tiles_fit_the_registers(machine: Machine) -> None:
    tile = tile_for(machine, 1, 100, 2)
    inputs = tile.mr if tile.step > 1 else 1
    assert tile.mr * tile.vectors + tile.vectors + inputs <= machine.registers
    assert tile.splits == 2
    assert tile_for(machine, 8, 100, 2).splits == 1
