"""Kernel-group sparsity is found in the weights themselves, accounted exactly and packed without loss."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dance_tvm.core.errors import DanceError
from dance_tvm.liveness.kernel_groups import (
    BREAK_EVEN,
    CANDIDATES,
    choose_kernel_groups,
    find_kernel_groups,
    lane_cost,
)


def dense_weight(*shape: int, seed: int = 0) -> np.ndarray:
    """Integers 1 .. 4 with random signs: no zero anywhere, exact in float32."""
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 5, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


def prune_columns(weight: np.ndarray, gm: int, gn: int, keep: np.ndarray) -> np.ndarray:
    """Zero the columns (p, q, tap) where ``keep`` is False, one kernel group at a time."""
    pruned = weight.reshape(*weight.shape[:2], -1).copy()
    for p, q, tap in zip(*np.nonzero(~keep), strict=True):
        pruned[p * gm : (p + 1) * gm, q * gn : (q + 1) * gn, tap] = 0
    return pruned.reshape(weight.shape)


def random_keep(weight: np.ndarray, gm: int, gn: int, share: float, seed: int = 1) -> np.ndarray:
    shape = (-(-weight.shape[0] // gm), -(-weight.shape[1] // gn), int(np.prod(weight.shape[2:])))
    return np.random.default_rng(seed).random(shape) < share


@given(
    filters=st.integers(1, 21),
    channels=st.integers(1, 19),
    kernel=st.sampled_from([(1, 1, 1), (3, 1, 1), (1, 3, 3), (3, 3, 3), (3, 3), (5,)]),
    group=st.sampled_from(CANDIDATES),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_any_pattern_is_found_counted_and_packed_without_loss(filters, channels, kernel, group, share, seed):
    gm, gn = group
    dense = dense_weight(filters, channels, *kernel, seed=seed)
    keep = random_keep(dense, gm, gn, share, seed)
    weight = prune_columns(dense, gm, gn, keep)

    groups = find_kernel_groups(weight, gm, gn)

    np.testing.assert_array_equal(groups.live, keep)
    np.testing.assert_array_equal(groups.unpack(), weight)
    taps = groups.taps
    assert groups.column_ptr.shape == (-(-filters // gm), taps + 1)
    assert groups.column_ptr[0, 0] == 0
    assert groups.column_ptr[-1, -1] == len(groups.columns)
    np.testing.assert_array_equal(groups.column_ptr[1:, 0], groups.column_ptr[:-1, -1])
    assert groups.weights.shape == (len(groups.columns), gm)
    assert groups.column_ptr.dtype == groups.columns.dtype == np.int32
    assert groups.weights.dtype == np.float32
    if groups.scheme in ("vanilla", "kgs"):
        assert groups.live_weights == np.count_nonzero(weight)
        assert groups.lanes == groups.weights.size


@given(group=st.sampled_from(CANDIDATES), share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_walking_the_column_lists_multiplies_exactly(group, share, seed):
    gm, gn = group
    dense = dense_weight(13, 10, 2, 1, 3, seed=seed)
    groups = find_kernel_groups(prune_columns(dense, gm, gn, random_keep(dense, gm, gn, share, seed)), gm, gn)
    window = np.random.default_rng(seed).integers(-8, 9, (10, 6)).astype(np.float32)  # channels x taps
    live = np.zeros(window.shape, bool)
    result = np.zeros(len(groups.live) * gm, np.float32)
    for p, starts in enumerate(groups.column_ptr):
        for tap in range(groups.taps):
            for column in range(starts[tap], starts[tap + 1]):
                channel = groups.columns[column]
                live[channel, tap] = True
                result[p * gm : (p + 1) * gm] += groups.weights[column] * window[channel, tap]
    expected = np.einsum("mnt,nt->m", groups.weight, window)
    np.testing.assert_array_equal(result[:13], expected)
    assert not result[13:].any(), "padded lanes stay zero"
    assert not groups.weight[:, ~live].any(), "what is not read has no weight"


def test_columns_of_a_tap_come_as_aligned_runs_of_ascending_channels():
    dense = dense_weight(8, 10, 1, 1, 2)
    keep = np.array([[[True, False], [False, True], [True, True]]])
    groups = find_kernel_groups(prune_columns(dense, 8, 4, keep), 8, 4)
    assert groups.column_ptr.tolist() == [[0, 6, 12]]
    assert groups.columns.tolist() == [0, 1, 2, 3, 8, 9, 4, 5, 6, 7, 8, 9]


def test_kgs_vanilla_and_filter_sparsity_are_told_apart():
    dense = dense_weight(16, 16, 3, 3, 3)
    kgs = prune_columns(dense, 4, 4, random_keep(dense, 4, 4, 0.4))
    whole = np.broadcast_to(random_keep(dense, 4, 4, 0.5)[:, :, :1], (4, 4, 27))
    rows = dense.copy()
    rows[[1, 6, 7, 12]] = 0
    assert find_kernel_groups(kgs, 4, 4).scheme == "kgs"
    assert find_kernel_groups(prune_columns(dense, 4, 4, whole), 4, 4).scheme == "vanilla"
    found = find_kernel_groups(rows, 4, 4)
    assert found.scheme == "filter"
    assert found.live_weights == 12 * 16 * 27
    assert find_kernel_groups(dense, 4, 4).scheme == "dense"


def test_filter_sparsity_drops_single_filters_and_the_channels_they_fed():
    weight = dense_weight(10, 9, 3, 3)
    weight[[0, 4]] = 0
    weight[:, [2, 8]] = 0
    groups = find_kernel_groups(weight, 4, 4)
    assert groups.scheme == "filter"
    assert groups.live_filters.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert groups.live_channels.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert groups.macs(output_positions=100) == 8 * 7 * 9 * 100
    np.testing.assert_array_equal(groups.compact(), weight[np.ix_(groups.live_filters, groups.live_channels)])


def test_an_all_zero_layer_has_no_columns():
    groups = choose_kernel_groups(np.zeros((6, 5, 3, 3, 3), np.float32))
    assert groups.scheme == "filter"
    assert groups.live_weights == groups.lanes == 0
    assert groups.rate == float("inf")
    assert groups.sparsity == 1
    assert groups.columns.size == 0
    assert groups.weights.shape == (0, groups.gm)
    assert not groups.column_ptr.any()
    assert not groups.unpack().any()


def test_an_empty_filter_group_keeps_empty_lists():
    dense = dense_weight(12, 8, 3, 1, 1)
    keep = random_keep(dense, 4, 4, 0.6)
    keep[1] = False
    groups = find_kernel_groups(prune_columns(dense, 4, 4, keep), 4, 4)
    assert len(set(groups.column_ptr[1])) == 1
    np.testing.assert_array_equal(groups.live, keep)


@pytest.mark.parametrize(("share", "scheme"), [(BREAK_EVEN - 0.03, "dense"), (BREAK_EVEN + 0.12, "kgs")])
def test_a_layer_under_the_break_even_is_dense_and_says_so(share, scheme):
    dense = dense_weight(64, 64, 3, 3, 3)
    groups = choose_kernel_groups(prune_columns(dense, 8, 4, random_keep(dense, 8, 4, 1 - share)))
    assert groups.scheme == scheme
    if scheme == "dense":
        assert "break-even" in groups.reason
        assert groups.live_weights == dense.size
        assert groups.sparsity == 0


def test_scattered_zeros_that_make_no_column_stay_dense():
    weight = dense_weight(32, 32, 3, 3, 3)
    weight[np.random.default_rng(0).random(weight.shape) < 0.3] = 0
    assert choose_kernel_groups(weight).scheme == "dense"


@pytest.mark.parametrize(("gm", "gn"), CANDIDATES)
def test_the_group_the_weights_were_pruned_in_is_chosen_when_lanes_are_free_of_padding(gm, gn):
    dense = dense_weight(64, 64, 3, 3, 3)
    chosen = choose_kernel_groups(prune_columns(dense, gm, gn, random_keep(dense, gm, gn, 0.3)), cost=lane_cost(4))
    assert (chosen.gm, chosen.gn, chosen.scheme) == (gm, gn, "kgs")


def test_wide_registers_make_narrow_groups_cost_their_padding():
    dense = dense_weight(64, 64, 3, 3, 3)
    weight = prune_columns(dense, 4, 4, random_keep(dense, 4, 4, 0.2))
    assert choose_kernel_groups(weight, cost=lane_cost(4)).gm == 4
    # Of the 4-filter columns 20 % survive, of the 8-filter ones 36 %: full lanes at 36 % beat half-empty ones at 20 %.
    assert choose_kernel_groups(weight, cost=lane_cost(8)).gm == 8


def test_an_injected_cost_decides():
    dense = dense_weight(32, 32, 3, 3, 3)
    weight = prune_columns(dense, 16, 8, random_keep(dense, 16, 8, 0.3))

    def prefers_4x1(groups):
        return groups.lanes * (0.5 if (groups.gm, groups.gn) == (4, 1) else 1.0)

    chosen = choose_kernel_groups(weight, cost=prefers_4x1)
    assert (chosen.gm, chosen.gn) == (4, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: find_kernel_groups(np.ones((4, 4, 3), np.float32), 0, 4),
        lambda: find_kernel_groups(np.ones(4, np.float32), 4, 4),
        lambda: find_kernel_groups(np.ones((0, 4, 3), np.float32), 4, 4),
        lambda: choose_kernel_groups(np.ones((4, 4, 3), np.float32), candidates=[]),
    ],
)
def test_bad_input_is_told_in_one_sentence(call):
    with pytest.raises(DanceError):
        call()
