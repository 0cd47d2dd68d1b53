"""From an exported network to kernels: what is skipped, what is not, and that the results stay those of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.machines.target import load_target


def integers(module: nn.Module, seed: int = 0) -> nn.Module:
    """Small integer weights, so that results compare exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator).float())
    return module.eval()


def compile_network(module: nn.Module, *inputs: torch.Tensor) -> tuple[Lowered, relax.VirtualMachine]:
    target = load_target("host")
    mod = from_exported_program(torch.export.export(module, inputs))
    lowered = lower(mod, target, Options(threads=2, conv="direct"))
    executable = tvm.compile(lowered.mod, target=target.tvm_target(2))
    return lowered, relax.VirtualMachine(executable, tvm.cpu())


def outputs(machine: relax.VirtualMachine, *inputs: torch.Tensor) -> list[np.ndarray]:
    result = machine["main"](*(tvm.runtime.tensor(value.numpy()) for value in inputs))
    return [item.numpy() for item in result]


def executed(machine: relax.VirtualMachine, *inputs: torch.Tensor) -> dict[int, int]:
    """Multiply-accumulates by layer, from the index lists."""
    total: dict[int, int] = {}
    for layer, pairs, reads, writes in machine["counts"](*(tvm.runtime.tensor(x.numpy()) for x in inputs)).numpy():
        total[int(layer)] = total.get(int(layer), 0) + int(pairs) * int(reads) * int(writes)
    return total


class Masked(nn.Module):
    """Two convolutions; the mask of the second one's input comes in from outside, known before either runs."""

    def __init__(self, after: nn.Module | None = None, position: str = "behind the activation") -> None:
        super().__init__()
        self.first = nn.Conv3d(4, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 6, 3, padding=1)
        self.after = after or nn.Identity()
        self.position = position

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        alive = (mask > 0).to(x.dtype)
        x = torch.relu(self.first(x)) * alive
        return self.second(self.after(x))


SHAPES = {
    "channels": (2, 8, 1, 1, 1),
    "frames": (2, 1, 4, 1, 1),
    "positions": (2, 1, 1, 12, 10),
    "positions of each frame": (2, 1, 4, 12, 10),
}


def masks(shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(-1, 2, shape, generator=generator).float()
    return [some, torch.ones(shape), torch.zeros(shape)]


@pytest.mark.parametrize("axis", SHAPES)
@pytest.mark.parametrize("after", [None, nn.MaxPool3d(2), nn.AvgPool3d((1, 2, 2), (1, 2, 2))], ids=["", "max", "avg"])
def test_mask_thins_both_convolutions(axis: str, after: nn.Module | None) -> None:
    network = integers(Masked(after))
    x = torch.randint(-3, 4, (2, 4, 4, 12, 10)).float()
    lowered, machine = compile_network(network, x, masks(SHAPES[axis])[0])
    first, second = [layer for layer in lowered.layers if layer.kind == "conv3d"]
    name = axis.split()[0]
    assert f"output {name}" in first.skips
    if name != "positions":
        assert f"input {name}" in second.skips
    for mask in masks(SHAPES[axis]):
        with torch.no_grad():
            expected = network(x, mask).numpy()
        np.testing.assert_allclose(outputs(machine, x, mask)[0], expected, atol=1e-4 if after else 0)
    assert executed(machine, x, masks(SHAPES[axis])[2])[0] == 0, "an all-zero mask leaves nothing to compute"


class SelfMasked(nn.Module):
    """The mask is computed from the very activation that it masks, so that it comes too late to thin its producer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(4, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.second(x * (x.sum((2, 3, 4), keepdim=True) > 400).float())


def test_late_mask_thins_its_reader_alone() -> None:
    network = integers(SelfMasked())
    x = torch.randint(-3, 4, (1, 4, 3, 5, 5)).float()
    lowered, machine = compile_network(network, x)
    first, second = lowered.layers
    assert not first.skips
    assert second.skips == ["input channels"]
    with torch.no_grad():
        np.testing.assert_array_equal(outputs(machine, x)[0], network(x).numpy())


class Soft(nn.Module):
    """Squeeze and excite: a factor that is no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(4, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.second(x * torch.sigmoid(x.mean((2, 3, 4), keepdim=True)))


def test_soft_factor_is_left_alone() -> None:
    network = Soft().eval()
    x = torch.randn(1, 4, 3, 5, 5)
    lowered, machine = compile_network(network, x)
    assert all(not layer.skips for layer in lowered.layers)
    with torch.no_grad():
        np.testing.assert_allclose(outputs(machine, x)[0], network(x).numpy(), atol=1e-5)


class TwoReaders(nn.Module):
    """One activation read by a masked convolution and, unmasked, by a shortcut."""

    def __init__(self, share: bool) -> None:
        super().__init__()
        self.first = nn.Conv3d(4, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 8, 3, padding=1)
        self.share = share

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        alive = (mask > 0).to(x.dtype)
        x = torch.relu(self.first(x))
        y = torch.relu(self.second(x * alive))
        return y + x if self.share else y * alive + x * alive


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("axis", SHAPES)
def test_several_readers(axis: str, share: bool) -> None:
    network = integers(TwoReaders(share))
    x = torch.randint(-3, 4, (2, 4, 4, 12, 10)).float()
    mask = masks(SHAPES[axis])[0]
    lowered, machine = compile_network(network, x, mask)
    first = lowered.layers[0]
    assert bool(first.skips) != share, "what a shortcut reads must be computed"
    with torch.no_grad():
        np.testing.assert_array_equal(outputs(machine, x, mask)[0], network(x, mask).numpy())


class Watched(nn.Module):
    """A mask between an activation that another reads whole, as a controller does, and the pool behind it."""

    def __init__(self, pool: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.pool, self.second = nn.Conv3d(4, 8, 3, padding=1), pool, second

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.first(x))
        return self.second(self.pool(x * (mask > 0).to(x.dtype))), x.sum(dim=(2, 3, 4))


@pytest.mark.parametrize("axis", SHAPES)
@pytest.mark.parametrize("pool", [nn.MaxPool3d(2), nn.AvgPool3d((1, 2, 2)), nn.MaxPool3d(3, 1, 1)], ids=str)
def test_a_pool_masks_what_it_reads(axis: str, pool: nn.Module) -> None:
    network = integers(Watched(pool, nn.Conv3d(8, 6, 3, padding=1)))
    x = torch.randint(-3, 4, (2, 4, 4, 12, 10)).float()
    lowered, machine = compile_network(network, x, masks(SHAPES[axis])[0])
    assert not any("multiply" in gvar.name_hint for gvar in lowered.mod.get_global_vars())
    for mask in masks(SHAPES[axis]):
        with torch.no_grad():
            for found, wanted in zip(outputs(machine, x, mask), network(x, mask), strict=True):
                np.testing.assert_array_equal(found, wanted.numpy())


def test_channels_that_a_pools_reader_looks_at_are_masked_before_it() -> None:
    grouped = integers(Watched(nn.MaxPool3d(2), nn.Conv3d(8, 8, 3, padding=1, groups=8)))
    x = torch.randint(-3, 4, (2, 4, 4, 12, 10)).float()
    mask = masks(SHAPES["channels"])[0]
    _, machine = compile_network(grouped, x, mask)
    with torch.no_grad():
        for found, wanted in zip(outputs(machine, x, mask), grouped(x, mask), strict=True):
            np.testing.assert_array_equal(found, wanted.numpy())


class Concatenated(nn.Module):
    """Two convolutions side by side; a mask of channels on both together or on the second alone, then a third."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Conv3d(4, 3, 3, padding=1), nn.Conv3d(4, 5, 1)
        self.last, self.together = nn.Conv3d(8, 6, 3, padding=1), together

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        alive = (mask > 0).to(x.dtype)
        if self.together:
            return self.last(torch.relu(torch.cat([self.left(x), self.right(x)], 1)) * alive)
        return self.last(torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x)) * alive], 1))


@pytest.mark.parametrize("together", [True, False])
def test_channels_pass_through_a_concatenation(together: bool) -> None:
    network = integers(Concatenated(together))
    x = torch.randint(-3, 4, (2, 4, 4, 6, 5)).float()
    width = 8 if together else 5
    lowered, machine = compile_network(network, x, masks((2, width, 1, 1, 1))[0])
    assert len(lowered.layers) == 3
    for mask in masks((2, width, 1, 1, 1)):
        with torch.no_grad():
            np.testing.assert_array_equal(outputs(machine, x, mask)[0], network(x, mask).numpy())
        left, right, last = (executed(machine, x, mask).get(layer, 0) for layer in range(3))
        positions = 4 * 6 * 5
        pairs = 10 * 16 * 13  # of position and tap, padding left out
        alive = (mask[:, :, 0, 0, 0] > 0).numpy()
        kept_left = alive[:, :3].sum() if together else 6
        kept_right = alive[:, 3:].sum() if together else alive.sum()
        assert left == pairs * 4 * kept_left
        assert right == positions * 4 * kept_right
        assert last == pairs * 6 * (kept_left + kept_right)


class Bias(nn.Module):
    """A bias between the mask and the reader: zeros do not survive it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1, 4, 1, 1, 1))
        self.conv = nn.Conv3d(4, 6, 3, padding=1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.conv(x * (mask > 0).to(x.dtype) + self.shift)


def test_bias_ends_what_is_known_to_be_zero() -> None:
    network = integers(Bias())
    x, mask = torch.randint(-3, 4, (1, 4, 3, 5, 5)).float(), masks((1, 4, 1, 1, 1))[0]
    lowered, machine = compile_network(network, x, mask)
    assert not lowered.layers[0].skips
    with torch.no_grad():
        np.testing.assert_array_equal(outputs(machine, x, mask)[0], network(x, mask).numpy())


def test_receptive_field_is_carried_backward() -> None:
    network = integers(Masked())
    network.second.stride = (2, 2, 2)
    x = torch.randint(-3, 4, (1, 4, 4, 6, 5)).float()
    mask = torch.zeros(1, 1, 4, 1, 1)
    mask[:, :, 0] = 1
    _, machine = compile_network(network, x, mask)
    with torch.no_grad():
        np.testing.assert_array_equal(outputs(machine, x, mask)[0], network(x, mask).numpy())
    all_frames = executed(machine, x, torch.ones_like(mask))
    one_frame = executed(machine, x, mask)
    assert 0 < one_frame[0] < all_frames[0] / 2


class Pruned(nn.Module):
    """Kernel groups of zero weights, and a mask on top."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.first = nn.Conv3d(4, 24, 3, padding=1)
        self.second = nn.Conv3d(24, 16, (1, 3, 3), padding=(0, 1, 1))
        self.masked = masked

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        if self.masked:
            x = x * (mask > 0).to(x.dtype)
        return torch.relu(self.second(x))


@pytest.mark.parametrize("masked", [False, True])
def test_zero_columns_are_skipped_with_and_without_masks(masked: bool) -> None:
    network = integers(Pruned(masked))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for conv in (network.first, network.second):
            groups = torch.rand((conv.out_channels // 8, conv.in_channels // 4, *conv.kernel_size), generator=generator)
            conv.weight *= (groups > 0.6).float().repeat_interleave(8, 0).repeat_interleave(4, 1)
    x = torch.randint(-3, 4, (2, 4, 3, 5, 5)).float()
    mask = masks((2, 24, 1, 1, 1))[0]
    lowered, machine = compile_network(network, x, mask)
    assert all("weight columns" in layer.skips for layer in lowered.layers)
    assert all("kgs" in layer.kernel for layer in lowered.layers)
    with torch.no_grad():
        np.testing.assert_array_equal(outputs(machine, x, mask)[0], network(x, mask).numpy())


class TwoDimensional(nn.Module):
    """2D convolutions with strides, groups, a depthwise one, a shortcut and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        x = torch.relu(self.grouped(torch.nn.functional.silu(self.depthwise(x))) + x)
        return torch.softmax(self.head(x.mean((2, 3))), 1)


def test_two_dimensional_network() -> None:
    torch.manual_seed(0)
    network = TwoDimensional().eval()
    for norm in [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 3, 21, 30)
    lowered, machine = compile_network(network, x)
    assert [layer.kind for layer in lowered.layers] == ["conv3d", "pool3d", "conv3d", "conv3d", "linear"]
    with torch.no_grad():
        np.testing.assert_allclose(outputs(machine, x)[0], network(x).numpy(), atol=1e-5)


def test_large_weights_leave_the_code() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4096, 1100)).eval()
    x = torch.randn(1, 4096)
    lowered, machine = compile_network(network, x)
    assert sum(value.nbytes for value in lowered.weights.values()) > 16 << 20
    weights = [tvm.runtime.tensor(value) for value in lowered.weights.values()]
    with torch.no_grad():
        got = machine["main"](tvm.runtime.tensor(x.numpy()), *weights)[0].numpy()
        np.testing.assert_allclose(got, network(x).numpy(), atol=1e-4)


class TilesOfInput(nn.Module):
    """A convolution of frames whose input, which others read as well, is masked by position from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 48, 3, padding=1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x)
        return torch.relu(self.second(x * (mask > 0).to(x.dtype))), x


@pytest.mark.parametrize("frames", [1, 4], ids=["shared", "of each frame"])
def test_dead_positions_of_the_input_are_neither_read_nor_multiplied(frames: int) -> None:
    network = integers(TilesOfInput())
    x = torch.randint(-3, 4, (4, 4, 12, 12)).float()
    tiles = torch.randint(-1, 2, (frames, 1, 3, 3), generator=torch.Generator().manual_seed(2))
    mask = tiles.float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    lowered, machine = compile_network(network, x, mask)
    assert lowered.layers[1].skips == ["input positions"]
    found, _ = outputs(machine, x.masked_fill(mask.expand_as(x) <= 0, float("nan")), mask)
    np.testing.assert_array_equal(found, network(x, mask)[0].detach().numpy())
    alive = (mask > 0).float().expand(4, 1, 12, 12)
    pairs = nn.functional.conv2d(alive, torch.ones(1, 1, 3, 3), padding=1).sum()
    assert executed(machine, x, mask)[1] == int(pairs) * 32 * 48


class Reusing(nn.Module):
    """Frames, as a batch, that take over channels of the frame before (D-STEP), under masks from outside."""

    def __init__(self, tells: int | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.tells = tells

    def forward(self, x: torch.Tensor, tiles: torch.Tensor, takes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shown, reuse = (tiles > 0).to(x.dtype), (takes > 0).to(x.dtype)
        fresh = shown * ((1 - reuse) * torch.relu(self.first(x)))
        maps = [fresh[:1]]
        for t in range(1, len(x)):
            maps.append(fresh[t : t + 1] + shown[t : t + 1] * (reuse[t : t + 1] * maps[-1]))
        told = () if self.tells is None else (maps[self.tells],)
        return (self.second(shown * torch.cat(maps)), *told)


@pytest.mark.parametrize("tells", [None, 1], ids=["one pass", "a frame that leaves the network"])
def test_a_chain_over_frames_is_one_pass(tells: int | None) -> None:
    """Unless somebody else reads one of its frames; then it stays as it is written."""
    network = integers(Reusing(tells))
    x = torch.randint(-3, 4, (4, 4, 32, 36)).float()  # too large to be joined with small operators
    tiles, takes = torch.randint(-1, 2, (4, 1, 32, 36)).float(), torch.randint(-1, 2, (4, 8, 1, 1)).float()
    lowered, machine = compile_network(network, x, tiles, takes)
    chains = [name for name in map(str, lowered.mod.get_global_vars()) if "carry_frames" in name]
    assert len(chains) == (tells is None)
    for found, expected in zip(outputs(machine, x, tiles, takes), network(x, tiles, takes), strict=True):
        np.testing.assert_array_equal(found, expected.detach().numpy())


class ChannelsInside(nn.Module):
    """A convolution between tensors that a network keeps with channels innermost."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


def test_a_networks_own_change_of_layout_costs_nothing() -> None:
    network, x = integers(ChannelsInside()), torch.randint(-3, 4, (1, 6, 6, 8)).float()
    lowered, machine = compile_network(network, x)
    assert not [name for name in map(str, lowered.mod.get_global_vars()) if "transpose" in name]
    np.testing.assert_array_equal(outputs(machine, x)[0], network(x).detach().numpy())
