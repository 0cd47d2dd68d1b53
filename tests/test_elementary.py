"""exp, log, tanh, erf, sin, pow and their like: error over all exponents, ends and NaN, and no scalar libm call."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import tvm
from convolutions import tensor
from torch import nn
from tvm import tirx

from dance_tvm import build_network, open_device
from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.frontend.importer import import_model
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.elementary import FUNCTIONS, SHORT, short, written_out
from dance_tvm.schedules.emit import argument, kernel, lanes, serial, store
from dance_tvm.schedules.epilogue import activate_for
from dance_tvm.schedules.wide_functions import ANGLE_END

SIZE = 1 << 18
LANES = 8
#: Largest error: in units of the last place of the result, or as a share of it.
ULPS = {"exp": 2.0, "log": 2.0, "log1p": 3.0, "sinh": 5.0, "cosh": 5.0}
ULPS |= dict.fromkeys(("sin", "cos", "tan"), 0.51 + 0.5)  # beyond wide_functions.ANGLE_END they are libm's
ULPS |= dict.fromkeys(("asin", "acos", "atan", "atan2", "pow"), 0.51)
PAIRS = ("pow", "atan2")
ANGLES = ("sin", "cos", "tan")
SHARE = {"tanh": 1e-6, "erf": 1e-6, "sigmoid": 6e-7}
SHORT_ULPS = 0.71
#: Below it sigmoid may be zero, for 1 + exp(-x) has more than 127 bits before the point.
SIGMOID_END = -88.37
ENDS = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e38, -3e38, 88.7, 89.0, -87.4, -103.9, -104.1]
#: Processors whose code is looked at, with their vectors.
PROCESSORS = {
    "AVX2": ({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}, 8),
    "AVX-512": ({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512"}, 16),
    "NEON": ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a78", "mattr": ["+neon"]}, 4),
}
LIBM = re.compile(r"\b(?:callq?|jmp|bl|b)\s+(?:exp|log|log1p|tanh|erf|sinh|cosh|sin|cos|tan|asin|acos|atan2?|pow)f?\b")


def applied(name: str, count: int, size: int = SIZE) -> tirx.PrimFunc:
    """``y = name(x)`` by vectors of ``count``."""
    with kernel(f"apply_{name}") as built:
        given = [argument(each, (size,)) for each in ("x", "z")[: 1 + (name in PAIRS)]]
        y = argument("y", (size,))
        with serial(size // count) as index:
            at = lanes(index * count, count)
            values = [each[at] for each in given]
            store(y, short(name, *values) if name in SHORT else getattr(tirx, name)(*values), at)
    return written_out(built.func)


@pytest.fixture(scope="module")
def machine_code() -> tvm.runtime.Module:
    functions = {f"apply_{name}": applied(name, LANES) for name in FUNCTIONS | SHORT}
    return tvm.compile(tvm.IRModule(functions), target=load_target("host").tvm_target(1))


def units_off(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the last place; NaN and infinities must be where they are once rounded."""
    with np.errstate(over="ignore"):
        rounded = exact.astype("float32")
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(found[~finite], rounded[~finite])
    np.testing.assert_array_equal(np.signbit(found[finite]), np.signbit(rounded[finite]))
    return float((np.abs(found[finite] - exact[finite]) / np.spacing(np.abs(rounded[finite])).astype("float64")).max())


def values() -> np.ndarray:
    """Random mantissas under every sign and exponent, and the ends."""
    rng = np.random.default_rng(3)
    patterns = rng.integers(0, 1 << 23, (512, SIZE // 512), dtype=np.uint32)
    patterns |= np.arange(512, dtype=np.uint32)[:, None] << 23
    x = patterns.reshape(-1).view("float32")
    x[: len(ENDS)] = ENDS
    return x


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in PAIRS])
def test_error_over_all_exponents(machine_code, name):
    x, y = values(), tensor(np.zeros(SIZE, "float32"))
    machine_code[f"apply_{name}"](tensor(x), y)
    found = y.numpy()
    exact = getattr(torch, name)(torch.from_numpy(x).double()).numpy()
    with np.errstate(over="ignore"):
        rounded = exact.astype("float32")
    if name == "sigmoid":
        rounded[x < SIGMOID_END] = found[x < SIGMOID_END]
        assert (np.abs(found[x < SIGMOID_END]) < 2.0**-126).all()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(rounded))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(rounded))
    np.testing.assert_array_equal(found[np.isinf(rounded)], rounded[np.isinf(rounded)])
    normal = np.isfinite(rounded) & (np.abs(exact) >= 2.0**-126) & ~((name == "sigmoid") & (x < SIGMOID_END))
    error = np.abs(found[normal] - exact[normal])
    if name in ULPS:
        assert (error / np.spacing(np.abs(rounded[normal]))).max() <= ULPS[name]
    else:
        assert (error / np.abs(exact[normal])).max() <= SHARE[name]
        np.testing.assert_array_equal(found[:2], rounded[:2])  # the limits at infinity, exact: 1 + tanh(-inf) is 0
    below = np.isfinite(rounded) & ~normal
    assert np.abs(found[below].astype("float64") - rounded[below]).max(initial=0) <= 2 * 2.0**-149


@pytest.mark.parametrize("name", ANGLES)
def test_angles_up_to_where_turns_are_counted(machine_code, name):
    """Within one rounding where no lane asks libm, near whole quarters of a turn too; zeros keep their sign."""
    rng = np.random.default_rng(5)
    x = rng.uniform(-ANGLE_END, ANGLE_END, SIZE)
    x[::3] = np.round(x[::3] / (np.pi / 2)) * (np.pi / 2)
    x[1::3] *= 2.0 ** rng.integers(-170, 0, x[1::3].shape)
    x[:4] = 0.0, -0.0, ANGLE_END, -ANGLE_END
    x, y = x.astype("float32"), tensor(np.zeros(SIZE, "float32"))
    machine_code[f"apply_{name}"](tensor(x), y)
    assert units_off(y.numpy(), getattr(np, name)(x.astype("float64"))) <= 0.51


@pytest.mark.parametrize("name", PAIRS)
def test_functions_of_pairs(machine_code, name):
    """Every end with every other, whole and broken exponents, and results over all of float32's numbers."""
    rng = np.random.default_rng(4)
    ends = np.array([*ENDS, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5, -2.5, 2.0**24 - 1, 2.0**24, -(2.0**31)], "float32")
    first, second = (each.reshape(-1) for each in np.meshgrid(ends, ends))
    x, z = values(), values()
    rng.shuffle(z)
    third = SIZE // 3
    if name == "pow":
        with np.errstate(divide="ignore", invalid="ignore"):
            z[:third] = rng.uniform(-160, 130, third) / np.log2(np.abs(x[:third]).astype("float64"))
        x[third : 2 * third] = 1 + rng.normal(size=third) * 1e-3
        z[third : 2 * third] = rng.normal(size=third) * 3e4
        z[2 * third :] = np.round(rng.normal(size=SIZE - 2 * third) * 5)
    x[: first.size], z[: first.size] = first, second
    y = tensor(np.zeros(SIZE, "float32"))
    machine_code[f"apply_{name}"](tensor(x), tensor(z), y)
    exact = getattr(torch, name)(torch.from_numpy(x).double(), torch.from_numpy(z).double()).numpy()
    assert units_off(y.numpy(), exact) <= ULPS[name]


@pytest.mark.parametrize("name", SHORT)
def test_what_half_precision_keeps_of_short_functions(machine_code, name):
    """Hardly more than half a unit in the last place once rounded, which is the rounding's own."""
    x, y = values(), tensor(np.zeros(SIZE, "float32"))
    machine_code[f"apply_{name}"](tensor(x), y)
    plain = name.removeprefix("short_")
    exact = getattr(torch if hasattr(torch, plain) else nn.functional, plain)(torch.from_numpy(x).double()).numpy()
    with np.errstate(over="ignore"):
        found, rounded = y.numpy().astype("float16"), exact.astype("float16")
    np.testing.assert_array_equal(np.isnan(found), np.isnan(rounded))
    np.testing.assert_array_equal(found[np.isinf(rounded)], rounded[np.isinf(rounded)])
    finite = np.isfinite(rounded)
    units = np.abs(found[finite] - exact[finite]) / np.spacing(np.abs(rounded[finite])).astype("float64")
    assert units.max() < SHORT_ULPS


def test_what_half_precision_keeps_of_gelu_by_tanh():
    """Of every number of half precision: the error of the short sigmoid, and that of x³ in float32 before it."""
    halves = np.arange(1 << 16, dtype=np.uint16).view("float16")
    with kernel("apply_gelu") as built:
        x, y = argument("x", halves.shape), argument("y", halves.shape)
        with serial(halves.size // LANES) as index:
            at = lanes(index * LANES, LANES)
            store(y, activate_for("float16", "gelu_tanh(x)", x[at], LANES), at)
    functions = tvm.IRModule({"apply_gelu": written_out(built.func)})
    y = tensor(np.zeros(halves.shape, "float32"))
    tvm.compile(functions, target=load_target("host").tvm_target(1))["apply_gelu"](tensor(halves.astype("float32")), y)
    exact = nn.functional.gelu(torch.from_numpy(halves).double(), approximate="tanh").numpy()
    found, rounded = y.numpy().astype("float16"), exact.astype("float16")
    np.testing.assert_array_equal(np.isnan(found), np.isnan(rounded))
    finite = np.abs(rounded) < np.finfo("float16").max  # the largest has no next one
    units = np.abs(found[finite] - exact[finite]) / np.spacing(np.abs(rounded[finite])).astype("float64")
    assert units.max() < SHORT_ULPS


def test_signs_of_zero(machine_code):
    x, y = np.zeros(SIZE, "float32"), tensor(np.zeros(SIZE, "float32"))
    x[1] = -0.0
    for name in ("tanh", "erf", "log1p", "asin", "atan", "short_tanh", "short_silu"):
        machine_code[f"apply_{name}"](tensor(x), y)
        assert np.signbit(y.numpy()[:2]).tolist() == [False, True], name


@pytest.mark.parametrize("processor", PROCESSORS)
def test_no_lane_is_alone(processor):
    """Vectors all the way: no call of libm and no arithmetic of single values, on any kind of processor; of angles
    beyond the end one call for each lane, behind a jump."""
    target, count = PROCESSORS[processor]
    functions = {f"apply_{name}": applied(name, count, 16 * count) for name in FUNCTIONS | SHORT}
    module = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target))
    code = module.mod.inspect_source("asm")
    assert sorted(re.split(r"\s", call)[-1] for call in LIBM.findall(code)) == sorted(
        f"{name}f" for name in ANGLES for _ in range(count)
    )
    arm = processor == "NEON"
    single = r"\bf(?:mul|add|sub|div|madd)\s+[sd]\d" if arm else r"\bv?(?:mul|add|sub|div|fmadd\d+)s[sd]\b"
    assert not re.findall(single, code)


def test_short_functions_divide_by_estimates_on_arm():
    """A division keeps its unit busy for the time of thirty other instructions."""
    target, count = PROCESSORS["NEON"]
    functions = {f"apply_{name}": applied(name, 2 * count, 16 * count) for name in SHORT}
    code = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target)).mod.inspect_source("asm")
    assert code.count("frecps") >= 2 * len(SHORT)
    assert "fdiv" not in code


class Mixed(nn.Module):
    """Operators that stay without a kernel of their own, over channels that fill no vector."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.softmax(1)
        return y, nn.functional.gelu(x), x.tanh() * x.exp(), nn.functional.softplus(x), torch.erf(x) + x.sigmoid()


def test_other_operators():
    network, x = Mixed(), torch.randn(1, 10, 4, 30, 31)
    target = load_target("host")
    lowered = lower(import_model(network, example_inputs=(x,), check=False).mod, target, Options())
    executable = tvm.compile(lowered.mod, target=target.tvm_target(1))
    machine = tvm.relax.VirtualMachine(executable, tvm.cpu())
    found = machine["main"](tensor(x.numpy()), *map(tensor, lowered.weights.values()))
    for ours, theirs in zip(found, network(x.double()), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-6, atol=1e-6)
    codes = [imported.inspect_source("asm") for imported in executable.mod.imports if imported.kind == "llvm"]
    assert codes
    assert not [call for code in codes for call in LIBM.findall(code)]


class Nested(nn.Module):
    """Each function read by another one, some of them twice: time to compile must not multiply."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.tanh().sigmoid().exp().erf().log1p()
        return y, nn.functional.mish(nn.functional.mish(x)), y.tanh() * y.sigmoid().tanh(), x.erf().exp().log().tanh()


def test_functions_of_functions(tmp_path):
    network, x = Nested(), torch.randn(1, 3, 4, 5, 7)
    artifact = build_network(network, tmp_path / "nested", example_inputs=(x,)).artifact
    with open_device("local") as device:
        found = device.load(artifact).run({artifact.manifest.inputs[0].name: x.numpy()}).values()
    for ours, theirs in zip(found, network(x.double()), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=2e-6)
