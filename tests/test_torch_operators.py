"""Kinds of PyTorch operators beyond the ordinary layers: each agrees with its source, also when it is built."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dance_tvm import build_network, import_model, open_device
from dance_tvm.frontend.interface import array_of

torch.manual_seed(0)
CLIP = torch.randn(2, 6, 4, 5, 7)
PICTURE = torch.randn(2, 3, 6, 9)


class Function(nn.Module):
    """A function of tensors as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def assigned_slices(x):
    """Assignment to slices in its written forms."""
    wider = x.new_zeros(2, 9, 4, 5, 7)
    wider[:, 1:7] = x
    strided = x.clone()
    strided[:, ::2, 1:] = x[:, 3:, :-1] * 2
    one = x.clone()
    one[:, -1] = 3.0
    one[..., 2] += x[..., 0]
    ring = F.pad(x, (1, 1)).contiguous()
    ring[..., :1] = x[..., -1:]
    ring[..., -1:] = x[..., :1]
    copied = x.clone()
    copied[:, 2:4].copy_(x[:, :2])
    turned = x.clone()
    turned.transpose(1, 2)[:, 1] = x[:, :, 0]
    return wider, strided, one, ring, copied, turned


def shifted_in_place(x):
    """Temporal shift as its authors wrote it, with assignments."""
    out = torch.zeros_like(x)
    out[:, :-1, :2] = x[:, 1:, :2]
    out[:, 1:, 2:4] = x[:, :-1, 2:4]
    out[:, :, 4:] = x[:, :, 4:]
    return out


def assigned_places(x):
    """Assignment by lists of positions, by constant masks and by masks that the input decides."""
    places, accumulated, pairs, masked, where = (x.clone() for _ in range(5))
    filled = (x.movedim(1, -1) * 0.5).movedim(-1, 1).index_fill(3, torch.tensor([2]), 0.5)
    places[:, [5, 0, 2]] = x[:, :3]
    accumulated.index_put_((torch.tensor([0, 1, 0]), torch.tensor([2, 2, 2])), x[:1, 0] + 1, accumulate=True)
    pairs[[0, 1], :, [1, 3]] = 7.0
    masked[:, torch.tensor([True, False, False, True, False, True])] *= 2
    where[where < 0] = 0.5
    diagonal = x.clone()
    torch.diagonal(diagonal, dim1=2, dim2=3).fill_(1.0)
    return places, accumulated, pairs, masked, where, diagonal, filled


def scattered(x):
    index = torch.tensor([[0, 2, 1], [1, 1, 3]])[:, :, None, None, None].expand(2, 3, 2, 3, 4)
    return [
        x.scatter(1, index, x[:, 3:]),
        x.scatter(1, index, 2.5),
        x.scatter_add(1, index, x),
        *(x.scatter_reduce(1, index, x, how) for how in ("sum", "prod", "amax", "amin", "mean")),
        *(x.scatter_reduce(1, index, x, how, include_self=False) for how in ("sum", "amax", "mean")),
        x.gather(1, index),
        x.index_add(2, torch.tensor([1, 1, 3]), x[:, :, :3]),
        x.as_strided((2, 3, 4), (5, 1, 2), 11),
    ]


def activations(x):
    return [
        torch.clamp(x, max=0.5),
        torch.clamp(x, min=x.mean(1, keepdim=True)),
        (x * 4).int().clamp(max=2),
        (x * 4).long().clamp(-1, 3),
        torch.erfc(x),
        torch.exp2(x),
        torch.hypot(x, x + 1),
        torch.copysign(x, x.flip(1)),
        torch.fmax(x, torch.full_like(x, 0.2)),
        F.hardsigmoid(x),
        F.mish(x),
        F.logsigmoid(x),
        F.tanhshrink(x),
        F.celu(x, 0.7),
        F.glu(x, 1),
        F.threshold(x, 0.1, -2.0),
        F.softsign(x),
        F.hardshrink(x, 0.4),
    ]


def resampled(x):
    return [
        F.interpolate(x, scale_factor=2, mode="trilinear"),
        F.interpolate(x, size=(3, 9, 4), mode="trilinear", align_corners=True),
        F.interpolate(x, scale_factor=(1.0, 0.5, 1.7), mode="nearest"),
        F.interpolate(x, size=(5, 4, 13), mode="nearest-exact"),
        F.interpolate(x.flatten(3), scale_factor=1.5, mode="bicubic"),
        F.interpolate(x.flatten(3), size=(7, 8), mode="bilinear", antialias=True),
        F.interpolate(x.flatten(2), size=50, mode="linear"),
    ]


def at_points(picture, grid):
    volume = picture[:, :, None].expand(2, 3, 4, 6, 9)
    deep = torch.cat([grid, grid[..., :1]], -1)[:, None]
    return [
        F.grid_sample(picture, grid, mode=mode, padding_mode=padding, align_corners=corners)
        for mode in ("bilinear", "nearest")
        for padding in ("zeros", "border", "reflection")
        for corners in (False, True)
    ] + [F.grid_sample(volume, deep, align_corners=False, padding_mode="border")]


def pooled_with_places(x):
    return [
        *F.max_pool3d(x, 2, stride=1, padding=1, return_indices=True),
        *F.max_pool2d(x.flatten(3), (3, 2), stride=2, return_indices=True),
        *F.adaptive_max_pool3d(x, (2, 3, 1), return_indices=True),
    ]


def scalars(x, gain, on):
    """Reductions to and of rank 0."""
    return x * gain, gain.sum(), gain.max(0)[0], torch.where(on, gain, -gain), gain.reshape(1), x.mean(), x.amax()


def without_statistics(x):
    return F.instance_norm(x), F.batch_norm(x, None, None, training=True), F.layer_norm(x, (7,))


def running_extremes(x):
    ties = torch.round(x)
    return [*torch.cummax(x, 2), *torch.cummin(ties, -1), *torch.cummax(ties, 0), *torch.cummax(x[0, 0, 0, 0, 0], 0)]


def with_nothing_inside(x):
    """Tensors of no elements on the way, as constants, and among the results."""
    nothing, weight = x[:, :0], torch.zeros(7, 0)
    return [
        torch.cat([x, nothing], 1),
        nothing.flatten(1).sum(1) + 1,
        weight @ torch.zeros(0, 3) + x[0, 0, 0, 0, 0],
        torch.zeros(0, 3),
        torch.gather(x, 3, torch.zeros(2, 6, 4, 0, 7, dtype=torch.long)),
        nothing,
    ]


def cut_and_taken(x):
    places = torch.tensor([[3, -1], [0, -5]])
    whole = (*torch.split(x, 9, 1), *torch.split(x, [0, 6], 1), *torch.split(x, [0, 2, 0, 4, 0], 1))
    return [*whole, *torch.split(x, [1, 5], 1), torch.take(x, places), torch.take(x[0, 0, 0, 0, 0], places * 0)]


def special(x, line):
    """Functions that no operator of Relax computes, at their ends too."""
    inside = torch.tanh(x)
    ends = torch.tensor([0.0, 1.0, -1.0, 1.5, 0.9999999, float("nan")])
    whole = torch.tensor([0.5, -0.5, -7.25, 1.0, 2.0, 90.0, float("inf"), 0.0, -3.0, -3e38, float("nan")])
    starts = torch.tensor([[float("-inf"), float("-inf"), 2.0], [-90.0, 3.0, float("inf")]])
    return (
        torch.erfinv(inside) + torch.erfinv(ends)[:1],
        torch.erfinv(ends * (x[0, 0, 0, 0, :6] * 0 + 1)),
        torch.lgamma(x.abs() * 3 + 0.1),
        torch.lgamma(whole * (x[0, 0, 0, 0, 0] * 0 + 1)),
        torch.logcumsumexp(x * 20, 2) + torch.logcumsumexp(x, -1),
        torch.logcumsumexp(starts + x[0, 0, 0, 0, 0] * 0, 1),
        torch.searchsorted(line, x),
        torch.searchsorted(x.sort(-1)[0], x.flip(0), right=True, out_int32=True),
        F.rrelu(x, 0.05, 0.35),
    )


KINDS = {
    "running extremes": (running_extremes, (CLIP,)),
    "nothing inside": (with_nothing_inside, (CLIP,)),
    "running sums": (
        lambda x, gain: [
            x.cumsum(2),
            (x > 0).cumsum(1),
            gain.cumsum(0) + gain.cumprod(-1),
            x[0, 0, 0].cumprod(1, dtype=torch.float64),
        ],
        (CLIP, torch.tensor(0.7)),
    ),
    "cut and taken": (cut_and_taken, (CLIP,)),
    "views of views": (
        lambda x: [
            x.unfold(3, 4, 1).unfold(2, 2, 2),
            x[1].as_strided((2, 3), (3, 1), 5),
            (x * 2).transpose(1, 2)[1].as_strided((2, 3), (3, 1)),
        ],
        (CLIP,),
    ),
    "axes of a scalar": (lambda x: x.mean().permute(()) + 1, (CLIP,)),
    "slices": (assigned_slices, (CLIP,)),
    "temporal shift": (shifted_in_place, (torch.randn(1, 6, 8, 5, 5),)),
    "places": (assigned_places, (CLIP,)),
    "scatter": (scattered, (CLIP,)),
    "activations": (activations, (CLIP,)),
    "special functions": (special, (CLIP, torch.tensor([-0.5, 0.0, 0.0, 0.25, 1.5]))),
    "resampling": (resampled, (CLIP,)),
    "points of a grid": (at_points, (PICTURE, torch.randn(2, 5, 4, 2))),
    "places of maxima": (pooled_with_places, (CLIP,)),
    "scalars": (scalars, (CLIP, torch.tensor(0.7), torch.tensor(True))),
    "norms without statistics": (without_statistics, (CLIP,)),
    "patches": (lambda x: F.fold(F.unfold(x, 3, padding=1, stride=3), (6, 9), 3, padding=1, stride=3), (PICTURE,)),
    "sorted": (lambda x: [*x.sort(2, descending=True), *x.topk(3, 1), torch.argsort(x, dim=0, stable=True)], (CLIP,)),
    "bilinear layer": (nn.Bilinear(9, 9, 4), (PICTURE, PICTURE + 1)),
    "buckets": (
        lambda x: [torch.bucketize(x, torch.tensor([-0.5, 0.0, 1.0]), right=r) for r in (False, True)],
        (CLIP,),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_operators_agrees_with_its_source(kind):
    function, inputs = KINDS[kind]
    import_model(Function(function), example_inputs=inputs)


@pytest.mark.parametrize(
    "kind",
    [
        *("slices", "temporal shift", "places", "scatter", "scalars", "points of a grid", "nothing inside"),
        *("running sums", "special functions"),
    ],
)
def test_what_moves_elements_is_built_right(kind, tmp_path):
    function, inputs = KINDS[kind]
    network = Function(function)
    built = build_network(network, tmp_path / "artifact", example_inputs=inputs, threads=1, check=False)
    names = [tensor.name for tensor in built.artifact.manifest.inputs]
    with open_device("local") as device:
        found = device.load(built.artifact).run(dict(zip(names, map(array_of, inputs), strict=True)))
    for array, value in zip(found.values(), torch.utils._pytree.tree_leaves(network(*inputs)), strict=True):
        torch.testing.assert_close(torch.as_tensor(array), value, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_remainders_and_floors_of_quotients_are_exact(tmp_path):
    """Multiples of a divisor that is no power of two: the rounded quotient has another floor."""
    x = torch.cat([torch.arange(-60, 60) / 20, torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e30])])
    divisors = torch.tensor([0.1, -0.1, 0.7, -2.5, 0.0]).repeat_interleave(len(x))

    def function(x, divisors):
        quotients = (x // 0.1, x // -0.7, torch.floor_divide(x, divisors))
        quotients = (*quotients, torch.div(x, divisors, rounding_mode="floor"))
        return (*quotients, x % 0.1, x % -0.7, torch.remainder(x, divisors), torch.fmod(x, divisors))

    inputs = (x.repeat(5), divisors)
    built = build_network(Function(function), tmp_path / "artifact", example_inputs=inputs, threads=1, check=False)
    names = [tensor.name for tensor in built.artifact.manifest.inputs]
    with open_device("local") as device:
        found = device.load(built.artifact).run(dict(zip(names, map(array_of, inputs), strict=True)))
    for value, expected in zip(found.values(), function(*inputs), strict=True):
        np.testing.assert_array_equal(value, expected.numpy())


def beyond_numbers(x, y):
    """Infinities and NaN in roots, bounds, lengths and what is filled with them."""
    filled = torch.full_like(x, torch.inf) / x, torch.zeros_like(x).fill_(-torch.inf), torch.full_like(x, torch.nan)
    bounded = torch.clamp(x, torch.nan, 1.0), torch.clamp(x, 0.0, torch.nan), torch.clamp(x, -torch.inf, torch.inf)
    return x**0.5, x**-0.5, x**y, torch.hypot(x, y), *filled, *bounded


def test_infinities_and_nan_are_those_of_the_source(tmp_path):
    edges = torch.tensor([0.0, -0.0, 2.0, -1.0, torch.inf, -torch.inf, torch.nan])
    x, y = (grid.flatten() for grid in torch.meshgrid(edges, edges, indexing="ij"))
    built = build_network(Function(beyond_numbers), tmp_path / "edges", example_inputs=(x, y))
    with open_device("local") as device:
        found = device.load(built.artifact).run({"inputs_0": x.numpy(), "inputs_1": y.numpy()})
    for got, wanted in zip(found.values(), beyond_numbers(x, y), strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5)


def test_whole_numbers_divided_by_none_give_none(tmp_path):
    """A processor's own division would end the process."""

    def function(x, sums):
        above = (x > 0).sum(1)
        quotients = sums // above, sums.int() // above.int(), torch.div(sums, above, rounding_mode="trunc")
        return *quotients, sums % above, torch.fmod(sums, above), sums // (above - 4)

    sums = torch.tensor([7, -7, -(2**63)])
    built = build_network(Function(function), tmp_path / "n", example_inputs=(torch.ones(3, 4), sums), check=False)
    x = torch.tensor([[1.0, 1, -1, -1], [-1, -1, -1, -1], [1, 1, 1, -1]])
    with open_device("local") as device:
        found = device.load(built.artifact).run({"inputs_0": x.numpy(), "inputs_1": sums.numpy()}).values()
    least = -(2**63)
    expected = [[3, 0, least // 3], [3, 0, 0], [3, 0, -(-least // 3)], [1, 0, least % 3], [1, 0, -(-least % 3)]]
    for got, wanted in zip(found, [*expected, [-4, 1, least]], strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_whole_numbers_without_a_sign_wrap_around(tmp_path):
    def function(x):
        return -x, torch.sign(x), x - x - 1, -(x - x + 1), x - 200, x + -1, 1 - x, (-x).float()

    x = torch.arange(256, dtype=torch.uint8)
    built = build_network(Function(function), tmp_path / "bytes", example_inputs=(x,), check=False)
    with open_device("local") as device:
        found = device.load(built.artifact).run({"inputs_0": x.numpy()}).values()
    for got, wanted in zip(found, function(x), strict=True):
        np.testing.assert_array_equal(got, wanted.numpy(), strict=True)


def test_types_are_promoted_as_pytorch_does_without_a_word(tmp_path):
    """In concatenations, in functions that have floats for results alone, and of whole numbers by their divisors."""

    def function(x, on, whole, divisors):
        joined = (
            torch.cat([whole, x], 1),
            torch.stack([on, x]),
            torch.cat([on, whole], 1),
            torch.hstack([on, whole.int()]),
        )
        floats = whole.exp(), on.sigmoid(), whole.round(), torch.atan2(whole, divisors), divisors.log(), whole.sinh()
        rests = 7 % divisors, -7 % divisors, 7 // divisors, whole // divisors, whole % divisors, 2.5 % x
        mixed = torch.maximum(whole > 1, whole) % -3, torch.maximum(on, whole) // divisors, (whole > 0) % divisors
        return *joined, *floats, *rests, *mixed, *on.max(1), torch.fmod(whole.byte(), -3), torch.signbit(x)

    x, whole = torch.randn(2, 8), torch.arange(-8, 8).reshape(2, 8)
    inputs = x, x > 0, whole, torch.tensor([1, 2, 3, 4, -1, -2, -3, -4])
    built = build_network(Function(function), tmp_path / "types", example_inputs=inputs, threads=1, check=False)
    names = [tensor.name for tensor in built.artifact.manifest.inputs]
    with open_device("local") as device:
        found = device.load(built.artifact).run(dict(zip(names, map(array_of, inputs), strict=True)))
    for got, wanted in zip(found.values(), function(*inputs), strict=True):
        torch.testing.assert_close(torch.as_tensor(got), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_chain_of_operators_that_read_their_input_twice_is_built_in_time_linear_in_its_length(tmp_path):
    """Computed where it is read, each link would stand twice in the next: 2^60 times at the end."""

    def chain(x):
        for _ in range(60):
            x = torch.cos(x * x)
        return x

    built = build_network(Function(chain), tmp_path / "artifact", example_inputs=(CLIP,), threads=1, check=True)
    assert built.artifact.manifest.check.status == "passed"


def test_whole_powers_are_products_of_which_tvm_says_nothing(tmp_path, capfd):
    """A cube is PyTorch's to the bit, of negative bases, infinities and NaN too, and chains of cubes stay short."""

    def function(x):
        small = x * 0.01
        for _ in range(12):
            small = (small**3).sin() + 0.5
        return x**3, x**4, x**5, x**7, x**8, x.double() ** 3, small

    x = torch.cat([torch.randn(60) * 3, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])])
    built = build_network(Function(function), tmp_path / "net", example_inputs=(x,), check=False)
    with open_device("local") as device:
        found = device.load(built.artifact).run({built.artifact.manifest.inputs[0].name: x.numpy()}).values()
    np.testing.assert_array_equal(next(iter(found)), (x**3).numpy())
    for ours, theirs in zip(found, function(x), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6)
    assert "Warning" not in capfd.readouterr().err
