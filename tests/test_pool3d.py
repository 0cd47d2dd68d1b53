"""Pools equal PyTorch's for any window, masks and number of vectors; nothing of a dead frame is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from convolutions import compiled, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dance_tvm.schedules.geometry import Window
from dance_tvm.schedules.pool3d import LOWEST, Pool, pool3d
from dance_tvm.schedules.spaces import POOLED_VECTORS, PoolSpace
from dance_tvm.schedules.tiles import Machine
from dance_tvm.schedules.workload import POOL, Workload


def run(pool: Pool, x: np.ndarray, in_frames: np.ndarray | None, out_frames: np.ndarray | None) -> np.ndarray:
    """The kernel's output over NaN; dead input frames hold NaN too."""
    masks = [mask.astype("float32") for mask in (in_frames, out_frames) if mask is not None]
    given = x.copy()
    if in_frames is not None:
        given[~in_frames] = np.nan
    y = tensor(np.full((pool.window.batch, *pool.window.out, pool.channels), np.nan, "float32"))
    compiled(pool3d(pool))(tensor(given), *map(tensor, masks), y)
    return y.numpy()


def expected(pool: Pool, x: np.ndarray, in_frames: np.ndarray | None) -> np.ndarray:
    alive = x.copy()
    if in_frames is not None:
        alive[~in_frames] = 0
    data = torch.from_numpy(alive).permute(0, 4, 1, 2, 3)
    sizes = (list(pool.window.kernel), list(pool.window.stride), list(pool.window.padding))
    if pool.kind == "max":
        found = torch.nn.functional.max_pool3d(data, *sizes)
    else:
        found = torch.nn.functional.avg_pool3d(data.double(), *sizes, count_include_pad=pool.count_padding).float()
    return found.permute(0, 2, 3, 4, 1).numpy()


@st.composite
def pools(draw: st.DrawFn) -> tuple[Pool, np.ndarray, np.ndarray | None, np.ndarray | None]:
    kernel = draw(st.sampled_from([(1, 2, 2), (2, 2, 2), (3, 3, 3), (1, 3, 3), (4, 5, 6)]))
    stride = draw(st.sampled_from([kernel, (1, 1, 1), (1, 2, 2)]))
    padding = draw(st.sampled_from([(0, 0, 0), tuple(extent // 2 for extent in kernel)]))
    size = (draw(st.integers(4, 5)), draw(st.integers(5, 7)), draw(st.integers(6, 8)))
    axes = zip(size, kernel, stride, padding, strict=True)
    out = tuple((extent + 2 * pad - taps) // step + 1 for extent, taps, step, pad in axes)
    window = Window(draw(st.integers(1, 2)), size, out, kernel, stride, padding)
    masks = [draw(st.sampled_from([None, 0.0, 0.5, 1.0])) for _ in range(2)]
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    shapes = ((window.batch, size[0]), (window.batch, out[0]))
    alive = [None if share is None else rng.random(shape) < share for shape, share in zip(shapes, masks, strict=True)]
    channels = draw(st.integers(1, 40))
    pool = Pool(
        window,
        channels,
        draw(st.sampled_from(["max", "avg"])),
        draw(st.sampled_from([4, 8])),
        count_padding=draw(st.booleans()),
        in_frames=alive[0] is not None,
        out_frames=alive[1] is not None,
        zero_dead=draw(st.booleans()),
        vectors=draw(st.sampled_from(POOLED_VECTORS)),
    )
    x = rng.integers(-9, 10, (window.batch, *size, channels)).astype("float32")
    return pool, x, alive[0], alive[1]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(pools())
def test_pools_equal_pytorch(case) -> None:
    pool, x, in_frames, out_frames = case
    found, wanted = run(pool, x, in_frames, out_frames), expected(pool, x, in_frames)
    read = np.ones(wanted.shape[:2], bool) if out_frames is None else out_frames
    if pool.kind == "max":
        np.testing.assert_array_equal(found[read], wanted[read])
    else:  # sums of small integers are exact, and the one division is rounded alike up to the last bit
        np.testing.assert_allclose(found[read], wanted[read], rtol=2e-7)
    dead = found[~read]
    assert np.all(dead == 0) if pool.zero_dead else np.all(np.isnan(dead))


def test_a_maximum_of_very_small_numbers_is_one_of_them() -> None:
    window = Window(1, (2, 2, 2), (1, 1, 1), (2, 2, 2), (2, 2, 2))
    x = np.full((1, 2, 2, 2, 9), -3e38, "float32")
    assert np.all(run(Pool(window, 9, "max", 4), x, None, None) == np.float32(-3e38))
    assert np.float32(LOWEST) == np.finfo("float32").min


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
