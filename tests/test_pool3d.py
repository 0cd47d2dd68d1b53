"""Pools equal PyTorch's for any window, masks and number of vectors; nothing dead is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from convolutions import call, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend.importer import import_model
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.pool3d import VectorPool
from dance_tvm.schedules.cpu.pool_space import POOLED_VECTORS, PoolSpace
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.geometry import Triple, Window
from dance_tvm.schedules.workload import POOL, Workload

#: Boolean masks by name, as ``Pool.masks`` has them; True is alive.
Masks = dict[str, np.ndarray]


def run(pool: VectorPool, x: np.ndarray, masks: Masks) -> np.ndarray:
    """The kernel's output over NaN; dead input frames and positions hold NaN too."""
    return call(pool, filled(x, masks, np.nan), masks)[0]


def filled(x: np.ndarray, masks: Masks, value: float) -> np.ndarray:
    """``x`` (N, T, H, W, C) with ``value`` wherever it is dead."""
    given = x.copy()
    if "in_frames" in masks:
        given[~masks["in_frames"]] = value
    if "in_positions" in masks:
        given[np.broadcast_to(~masks["in_positions"], x.shape[:-1])] = value
    return given


def expected(pool: VectorPool, x: np.ndarray, masks: Masks) -> np.ndarray:
    data = torch.from_numpy(filled(x, masks, 0)).permute(0, 4, 1, 2, 3)
    window = pool.window
    sizes = (window.kernel, window.stride, window.padding)
    ceil = outputs(window.size, *sizes, ceil=False) != window.out
    if pool.pooling == "max":
        found = torch.nn.functional.max_pool3d(data, *sizes, ceil_mode=ceil)
    else:
        include = any(pool.counted[0])
        mean = torch.nn.functional.avg_pool3d
        found = mean(data.double(), *sizes, ceil_mode=ceil, count_include_pad=include).float()
    return found.permute(0, 2, 3, 4, 1).numpy()


def outputs(size: Triple, kernel: Triple, stride: Triple, padding: Triple, *, ceil: bool) -> Triple:
    """How many windows PyTorch puts along each axis."""
    return tuple(
        torch.nn.functional.max_pool3d(torch.zeros(1, *size), kernel, stride, padding, ceil_mode=ceil).shape[1:]
    )


@st.composite
def pools(draw: st.DrawFn) -> tuple[VectorPool, np.ndarray, Masks]:
    kernel = draw(st.sampled_from([(1, 2, 2), (2, 2, 2), (3, 3, 3), (1, 3, 3), (4, 5, 6)]))
    stride = draw(st.sampled_from([kernel, (1, 1, 1), (1, 2, 2)]))
    padding = draw(st.sampled_from([(0, 0, 0), tuple(extent // 2 for extent in kernel)]))
    size = (draw(st.integers(4, 5)), draw(st.integers(5, 7)), draw(st.integers(6, 8)))
    out = outputs(size, kernel, stride, padding, ceil=draw(st.booleans()))
    window = Window(draw(st.integers(1, 2)), size, out, kernel, stride, padding)
    told = (draw(st.sampled_from([1, window.batch])), draw(st.sampled_from([1, size[0]])))
    pool_masks = [draw(st.booleans()) for _ in range(4)]
    of_outputs = (draw(st.sampled_from([1, window.batch])), draw(st.sampled_from([1, out[0]])))
    channels = draw(st.integers(1, 40))
    pool = VectorPool(
        window,
        channels,
        draw(st.sampled_from(["max", "avg"])),
        vector_floats=draw(st.sampled_from([4, 8])),
        counted=draw(st.sampled_from([((0, 0, 0), (0, 0, 0)), (padding, padding)])),
        in_frames=pool_masks[0],
        out_frames=pool_masks[1],
        in_positions=told if pool_masks[2] else None,
        positions=of_outputs if pool_masks[3] else None,
        zero_dead=draw(st.booleans()),
        vectors=draw(st.sampled_from(POOLED_VECTORS)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    alive = {name: rng.random(each.shape) < draw(st.sampled_from([0.0, 0.5, 1.0])) for name, each in pool.masks.items()}
    x = rng.integers(-9, 10, (window.batch, *size, channels)).astype("float32")
    return pool, x, alive


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(pools())
def test_pools_equal_pytorch(case) -> None:
    pool, x, masks = case
    found, wanted = run(pool, x, masks), expected(pool, x, masks)
    frames = masks.get("out_frames", np.ones(wanted.shape[:2], bool))
    positions = np.broadcast_to(masks.get("positions", np.ones((1, 1, 1, 1), bool)), wanted.shape[:-1])
    read = frames[:, :, None, None] & positions
    if pool.pooling == "max":
        np.testing.assert_array_equal(found[read], wanted[read])
    else:  # sums of small integers are exact, and the one division is rounded alike up to the last bit
        np.testing.assert_allclose(found[read], wanted[read], rtol=2e-7)
    assert not found[frames[:, :, None, None] & ~positions].any()
    dead = found[~frames]
    assert np.all(dead == 0) if pool.zero_dead else np.all(np.isnan(dead))


@pytest.mark.parametrize("value", [-3e38, -np.inf])
def test_a_maximum_of_very_small_numbers_is_one_of_them(value: float) -> None:
    window = Window(1, (2, 2, 2), (1, 1, 1), (2, 2, 2), (2, 2, 2))
    x = np.full((1, 2, 2, 2, 9), value, "float32")
    assert np.all(run(VectorPool(window, 9, "max", vector_floats=4), x, {}) == np.float32(value))


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_every_window_that_reads_nan_gives_nan(kind) -> None:
    window = Window(1, (3, 4, 5), (3, 3, 5), (3, 2, 3), padding=(1, 0, 1))
    x = np.arange(3 * 4 * 5 * 21, dtype="float32").reshape(1, 3, 4, 5, 21) % 23 - 11
    for place in ((0, 0, 0, 0), (1, 3, 2, 5), (2, 1, 4, 20), (1, 1, 1, 8)):
        x[(0, *place)] = np.nan
    x[0, 0, 2, 2, 3], x[0, 1, 0, 3, 9] = np.inf, -np.inf
    pool = VectorPool(window, 21, kind, vector_floats=4, vectors=2)
    np.testing.assert_allclose(run(pool, x, {}), expected(pool, x, {}), rtol=2e-7)


def test_padding_that_counts_may_differ_before_and_behind() -> None:
    window = Window(1, (1, 1, 4), (1, 1, 4), (1, 1, 3), (1, 1, 2), (0, 0, 1))  # windows begin at -1, 1, 3 and 5
    x = np.array([6.0, 12, 18, 24], "float32").reshape(1, 1, 1, 4, 1)
    pool = VectorPool(window, 1, "avg", vector_floats=4, counted=((0, 0, 1), (0, 0, 3)))
    assert run(pool, x, {}).ravel().tolist() == [6, 18, 8, 0], "of three taps, of three, of three, of two"


OFFERED = [(3, [1], 1), (8, [1], 1), (24, [1, 2, 3], 3), (512, [1, 2, 4, 8], 4)]


@pytest.mark.parametrize(("channels", "counts", "default"), OFFERED)
def test_the_space_offers_as_many_vectors_as_there_are_channels(channels, counts, default) -> None:
    window = Window(1, (2, 4, 4), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    work = Workload(window, channels, channels, channels, family=POOL, pooling="max")
    space = PoolSpace(Machine(8, 16, 32768, 524288, True), work)
    assert space.parts() == [{"vectors": counts}]
    assert space.size == len(counts)
    assert space.default() == {"vectors": default}
    assert all(space.allows({"vectors": count}) for count in counts)
    assert not space.allows({"vectors": 15})  # no register is left to load into
    assert not space.allows({"mr": 4})
    assert space.normal({"vectors": 8}) == {"vectors": counts[-1]}


class Masked(torch.nn.Module):
    """Two convolutions with a pool behind each; of the second's output a mask of positions is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv3d(3, 16, 3, padding=1), torch.nn.Conv3d(16, 16, 3, padding=1)
        self.last = torch.nn.Conv3d(16, 4, 3, padding=1)

    def forward(self, clip: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        alive = (mask > 0.5).float()
        pool = torch.nn.functional.max_pool3d
        found = self.second(pool(self.first(clip).relu(), (1, 2, 2))).relu() * alive
        return self.last(pool(found, (1, 2, 2))) * alive[..., ::2, ::2]


def test_masks_of_positions_reach_through_pools_to_the_convolution_before() -> None:
    torch.manual_seed(0)
    network, target = Masked().eval(), load_target("host")
    clip, mask = torch.randn(1, 3, 3, 24, 32), torch.zeros(1, 1, 1, 12, 16)
    mask[..., 2:6, 4:8] = 1
    lowered = lower(import_model(network, example_inputs=(clip, mask), check=False).mod, target, Options(threads=1))
    seconds = [work.lists for work in lowered.workloads.values() if work.family == POOL]
    kernels = [(layer.kernel, layer.skips) for layer in lowered.layers]
    assert ("_pool_" in kernels[0][0], kernels[0][1]) == (True, ["output positions"]), "what the second one reads of it"
    assert seconds in ([], [("positions", "in_positions")]), "the convolution before writes no zeros"
    machine = tvm.relax.VirtualMachine(tvm.compile(lowered.mod, target=target.tvm_target(1)), tvm.cpu())
    exact = network.double()(clip.double(), mask.double()).detach().numpy()
    found = machine["main"](*map(tensor, (clip.numpy(), mask.numpy(), *lowered.weights.values())))[0].numpy()
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
