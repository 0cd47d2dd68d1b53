"""What a program should answer, and how far rounding may lead from it: PyTorch in float64, with and without noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .program import PREAMBLE, Network

#: Allowed of an output's own largest value, where nothing in the network magnifies rounding.
TOLERANCE = {"float32": 3e-5, "float16": 2e-2}
_NOISE = {"float32": 4e-6, "float16": 3e-3}  # what a kernel's result may be off, of its largest value
_ROUNDED = 2e-7  # the same for arithmetic on pairs of elements, which a kernel may do in another order
_MARGIN = {"float32": 1e-4, "float16": 2e-2}  # nearer to a threshold, of the largest value, rounding may decide
_FLOOR = 1e-9  # outputs below it, of the largest value inside the network, are rounding alone

_SUMS = {"convolution", "mm", "addmm", "bmm", "baddbmm", "mean", "sum", "var", "std", "native_layer_norm", "cumsum"}
_SUMS |= {"native_group_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "avg_pool2d", "avg_pool3d"}
_SUMS |= {
    "exp",
    "log",
    "sigmoid",
    "tanh",
    "_softmax",
    "_log_softmax",
    "sqrt",
    "rsqrt",
    "pow",
    "sin",
    "cos",
    "erf",
    "gelu",
}
_SUMS |= {"upsample_bilinear2d", "upsample_trilinear3d", "upsample_linear1d", "silu", "norm", "linalg_vector_norm"}
_PAIRS = {"add", "sub", "rsub", "mul", "div"}
_COMPARED = {"gt", "ge", "lt", "le", "eq", "ne"}
_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": lambda x: x.abs(),
    "heaviside": lambda x: x.abs(),
    "round": lambda x: ((x - x.floor()) - 0.5).abs(),
    **{name: lambda x: (x - x.round()).abs() for name in ("floor", "ceil", "trunc", "_to_copy", "frac", "to")},
}


@dataclass
class Answer:
    """Outputs in float64 and, for each, the difference that rounding explains."""

    outputs: list[Tensor]
    allowed: list[float]
    dtypes: list[torch.dtype]


class Watch(TorchDispatchMode):
    """Looks at a run: decisions that rounding could turn, the largest value; and adds noise to what kernels compute."""

    def __init__(self, dtype: str, noise: torch.Generator | None = None) -> None:
        super().__init__()
        self._dtype, self._generator = dtype, noise
        self.close = False
        self.largest = 0.0
        self.decisions: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_") if func.overloadpacket.__name__ != "_to_copy" else "_to_copy"
        name = func.overloadpacket.__name__ if name not in _STEPS and name not in _COMPARED else name
        self._look(name, args, result)
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, Tensor) and first.is_floating_point() and first.numel():
            self.largest = max(self.largest, peak(first))
            share = _NOISE[self._dtype] if name in _SUMS else _ROUNDED if name in _PAIRS else 0.0
            if self._generator is not None and share:
                draw = torch.randn(first.shape, generator=self._generator, dtype=first.dtype)
                if name in _PAIRS:
                    draw = draw * (first != 0)  # zeros of masks stay zeros
                noisy = first + draw * (peak(first) * share)
                return (noisy, *result[1:]) if isinstance(result, tuple) else noisy
        return result

    def _look(self, name: str, args: Any, result: Any) -> None:
        operands = [value for value in args[:2] if isinstance(value, Tensor) and value.is_floating_point()]
        if not operands or not isinstance(result, Tensor):
            return
        if name in _COMPARED:
            other = args[1] if operands[0] is args[0] else args[0]
            scale = max(peak(value) for value in operands)
            self._near((args[0] - args[1]).abs() if isinstance(other, Tensor) else (operands[0] - other).abs(), scale)
            self.decisions.append(result)
        elif name == "argmax":
            top = operands[0].sort(-1 if len(args) < 2 or args[1] is None else args[1])[0].flatten()
            self._near(top.diff().abs(), peak(operands[0]))
            self.decisions.append(result)
        elif name in _STEPS and (name != "_to_copy" or not result.is_floating_point()):
            x = operands[0]
            self._near(_STEPS[name](x), max(1.0, peak(x)) if name != "sign" else peak(x))
            self.decisions.append(result)

    def _near(self, distance: Tensor, scale: float) -> None:
        """Exact agreement is no doubt: such values are zeros and ones, not sums."""
        self.close = self.close or bool(((distance > 0) & (distance < _MARGIN[self._dtype] * scale)).any())


def answer(network: Network, inputs: Sequence[Tensor], dtype: str) -> Answer | None:
    """What the network answers; None where rounding could decide otherwise, or magnifies without bound."""
    exact = copy.deepcopy(network.module).double()
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    plain = Watch(dtype)
    outputs = _run(exact, wide, plain)
    finite = all(bool(tensor.isfinite().all()) for tensor in inputs)
    if plain.close or (finite and not all(bool(output.isfinite().all()) for output in outputs)):
        return None
    single = _run(network.module, inputs, None)
    apart = [_distance(a, b) for a, b in zip(single, outputs, strict=True)]
    for seed in (1, 2):
        noisy = Watch(dtype, torch.Generator().manual_seed(seed))
        moved = _run(exact, wide, noisy)
        same = len(noisy.decisions) == len(plain.decisions) and all(map(torch.equal, noisy.decisions, plain.decisions))
        if not same:
            return None
        apart = [max(old, _distance(a, b)) for old, a, b in zip(apart, moved, outputs, strict=True)]
    scales = [peak(output) for output in outputs]
    if any(
        distance > 0.03 * scale for distance, scale in zip(apart, scales, strict=True) if scale > 1e-6 * plain.largest
    ):
        return None  # ill-conditioned: PyTorch's own float32 says as little
    dtypes = [output.dtype for output in single]
    allowed = [
        _rounding(given, dtype) * scale + 6 * distance + _FLOOR * plain.largest if given.is_floating_point else 0.0
        for distance, scale, given in zip(apart, scales, dtypes, strict=True)
    ]
    return Answer(outputs, allowed, dtypes)


def _rounding(output: torch.dtype, dtype: str) -> float:
    return TOLERANCE[dtype] + (5e-4 if output == torch.float16 else 0.0)


def peak(x: Tensor) -> float:
    """The largest finite magnitude; 0 where there is none."""
    return float(x.detach().double().abs().nan_to_num(0.0, 0.0, 0.0).amax()) if x.numel() else 0.0


def _run(module: nn.Module, inputs: Sequence[Tensor], watch: Watch | None) -> list[Tensor]:
    given = [tensor.clone() for tensor in inputs]
    before = torch.get_default_dtype()
    with torch.no_grad():
        if watch is None:
            results = module(*given)
        else:
            torch.set_default_dtype(torch.float64)
            try:
                with watch:
                    results = module(*given)
            finally:
                torch.set_default_dtype(before)
    return [results] if isinstance(results, Tensor) else list(results)


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return float(difference.nan_to_num(float("inf")).max()) if difference.numel() else 0.0


_scope: dict[str, Any] = {}
exec(PREAMBLE, _scope)
drawn = _scope["drawn"]

STYLES = ("normal", "offset", "sparse", "on", "off", "small", "large")


_SPECIAL = (float("nan"), float("nan"), float("inf"), float("-inf"), -0.0)


def draw_inputs(
    network: Network, rng: Random, style: str, batch: int | None = None, special: bool = False
) -> list[Tensor]:
    """Inputs in one of several styles; masks' scores are scattered around their thresholds unless all on or all off.
    Some elements of ``special`` ones are no numbers, infinite or -0."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    inputs = []
    for name, shape in network.batched(batch).items():
        dtype = network.dtypes[name]
        x = drawn(shape, dtype, generator)
        if not dtype.is_floating_point:
            if style == "large" and dtype != torch.bool:
                x = torch.where(x > 1, torch.iinfo(dtype).max, torch.where(x < -1, torch.iinfo(dtype).min, x))
        elif name in network.masks:
            x = {"on": x.abs() + 2, "off": -x.abs() - 2}.get(style, x)
        else:
            x = {
                "offset": x * 3 + 10,
                "sparse": x * (torch.rand(shape, generator=generator) < 0.3),
                "small": x * 1e-3,
                "large": x * 30,
            }.get(style, x)
        if special and dtype.is_floating_point and x.numel():
            for _ in range(rng.choice((0, 1, 1, 2, 3))):
                x.view(-1)[rng.randrange(x.numel())] = rng.choice(_SPECIAL)
        inputs.append(x.to(dtype))
    return inputs
