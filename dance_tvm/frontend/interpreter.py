"""Evaluate a Relax module's graph operators with PyTorch: exact, fast enough for whole networks, nothing compiled.

It is the second opinion on every import and every graph pass: a slow untuned build of a large 3D network would take
minutes, this takes as long as PyTorch does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import tvm
from tvm import relax

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.compiled_call import compiled_call
from dance_tvm.frontend.interface import tensor_of
from dance_tvm.frontend.interpreter_layers import NEURAL
from dance_tvm.frontend.interpreter_tensors import BINARY, TENSORS, UNARY
from dance_tvm.frontend.interpreter_values import Kernel, Value, is_float, on_tensors


class _Floats(NamedTuple):
    """How floats are computed: in float64 instead of what the module says; inputs, weights and what is summed a
    little off."""

    wide: bool = False
    noise: torch.Generator | None = None

    def as_computed(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input or constant as it takes part: wide, or a little off, where that is asked for."""
        if not tensor.is_floating_point():
            return tensor
        # Whole numbers are compared with, and mean themselves.
        if self.noise is not None and bool((tensor != tensor.round()).any()):
            tensor = _a_little_off(tensor, self.noise)
        return tensor.double() if self.wide else tensor

    def widened(self, value: Value) -> Value:
        """Floats that were computed as the module says, for those that are computed in float64."""
        if isinstance(value, tuple):
            return tuple(map(self.widened, value))
        wide = self.wide and isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if wide else value

    def attributes(self, attrs: Any) -> Any:
        """Attributes of an operator, whose types of floats are float64 where that is asked for."""
        return _WideAttributes(attrs) if self.wide else attrs

    def as_summed(self, name: str, arguments: list[Value]) -> list[Value]:
        """The arguments of an operator, what it sums off by as much as its rounding amounts to."""
        first = arguments[0] if arguments else None
        if self.noise is None or not isinstance(first, torch.Tensor) or not first.is_floating_point():
            return arguments
        if name in _MEANS or (name in _SUMS and bool((first != first.round()).any())):
            return [_a_little_off(first, self.noise), *arguments[1:]]
        return arguments


def _a_little_off(tensor: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    return tensor * (1 + _NOISE * torch.randn(tensor.shape, generator=noise)).to(tensor.dtype)


class _WideAttributes:
    """Attributes of an operator with float64 in the place of other types of floats."""

    def __init__(self, attrs: Any) -> None:
        self._attrs = attrs

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._attrs, name)
        return "float64" if name in ("dtype", "out_dtype") and is_float(value) else value


_AS_WRITTEN = _Floats()

#: By how much noise changes an input, a weight or a value that is summed, as a share: a few roundings of float32.
_NOISE = 2e-7

#: What sums values up, which rounds as if each value were a little off.
_SUMS = {
    *(f"relax.nn.{kind}{rank}d" for kind in ("conv", "avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3)),
    *(f"relax.nn.conv{rank}d_transpose" for rank in (1, 2, 3)),
    *("relax.cumsum", "relax.einsum", "relax.matmul", "relax.sum"),
}

#: What divides by a sum, so that whole numbers round too: a norm takes all that a constant volume has from rounding.
_MEANS = {
    *("relax.mean", "relax.std", "relax.variance"),
    *("relax.nn.group_norm", "relax.nn.instance_norm", "relax.nn.layer_norm"),
}


def evaluate(mod: tvm.IRModule, inputs: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, torch.Tensor]:
    """The value of every variable of ``main``, by its name, for ``inputs`` by parameter name; keeps all in memory.

    What PyTorch has no counterpart of is compiled by TVM, one call at a time. Raises DanceError for ``call_tir``.
    """
    return {name: value for name, value in trace(mod, inputs) if isinstance(value, torch.Tensor)}


def outputs(
    mod: tvm.IRModule,
    inputs: Mapping[str, np.ndarray | torch.Tensor],
    *,
    wide: bool = False,
    noise: torch.Generator | None = None,
) -> tuple[torch.Tensor, ...]:
    """What ``main`` returns, as a flat tuple; values are dropped as soon as they are no longer needed.

    ``wide`` computes in float64 what the module computes in float32; ``noise`` sets inputs, weights and what is summed
    off by a few roundings, which shows how far rounding alone can move the result.
    """
    ((_, value),) = deque(_trace(mod, inputs, _Floats(wide, noise)), maxlen=1)
    return value if isinstance(value, tuple) else (value,)


class Part:
    """What some variables of ``main`` depend on, evaluated for one input after another."""

    def __init__(self, mod: tvm.IRModule, wanted: Sequence[relax.Var]) -> None:
        function = mod["main"]
        self._params, self._wanted = list(function.params), list(wanted)
        needed, self._bindings = set(wanted), []
        for binding in reversed([binding for block in function.body.blocks for binding in block.bindings]):
            if binding.var in needed:
                needed.update(relax.analysis.free_vars(binding.value))
                self._bindings.append((binding.var, binding.value))
        self._bindings.reverse()

    def values(self, inputs: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The variables' values, in order, for ``inputs`` in the order of the parameters."""
        values: dict[relax.Var, Value] = dict(zip(self._params, map(_tensor, inputs), strict=True))
        with torch.inference_mode():
            for var, expression in self._bindings:
                values[var] = _evaluate(expression, values, _AS_WRITTEN)
        return [values[var] for var in self._wanted]


def trace(
    mod: tvm.IRModule, inputs: Mapping[str, np.ndarray | torch.Tensor], *, wide: bool = False
) -> Iterator[tuple[str, Value]]:
    """Each variable's name and value, in the order of evaluation; the result comes last, under the name ``return``.

    A value is let go once the caller and the steps that follow no longer need it. ``wide`` is that of ``outputs``.
    """
    return _trace(mod, inputs, _Floats(wide))


def _trace(
    mod: tvm.IRModule, inputs: Mapping[str, np.ndarray | torch.Tensor], floats: _Floats
) -> Iterator[tuple[str, Value]]:
    function = mod["main"]
    values: dict[relax.Var, Value] = {}
    for param in function.params:
        if param.name not in inputs:
            raise DanceError(f"input {param.name!r} is missing: give one array for each of the network's inputs")
        values[param] = floats.as_computed(_tensor(inputs[param.name]))
        yield param.name, values[param]
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    last_use = _last_uses(bindings, function.body.body)
    with torch.inference_mode():
        for step, binding in enumerate(bindings):
            expression = binding.value
            value = _evaluate(expression, values, floats)
            values[binding.var] = value
            yield binding.var.name, value
            for var in last_use.get(step, ()):
                values.pop(var, None)
        yield "return", _evaluate(function.body.body, values, floats)


def _last_uses(bindings: list[Any], result: relax.Expr) -> dict[int, list[relax.Var]]:
    """For each step the variables that no later step reads."""
    last: dict[relax.Var, int] = {}
    for step, binding in enumerate(bindings):
        last[binding.var] = step
        for var in relax.analysis.free_vars(binding.value):
            last[var] = step
    for var in relax.analysis.free_vars(result):
        last.pop(var, None)
    dying: dict[int, list[relax.Var]] = {}
    for var, step in last.items():
        dying.setdefault(step, []).append(var)
    return dying


def _tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    return array if isinstance(array, torch.Tensor) else tensor_of(array)


def _evaluate(expression: Any, values: Mapping[relax.Var, Value], floats: _Floats) -> Value:
    if isinstance(expression, relax.Var):
        return values[expression]
    if isinstance(expression, tvm.ir.expr.GenericConst):
        # A copy: TVM's arrays may be read-only, PyTorch's never are.
        return floats.as_computed(torch.from_numpy(expression.value.numpy().copy()))
    if isinstance(expression, relax.Tuple):
        return tuple(_evaluate(field, values, floats) for field in expression.fields)
    if isinstance(expression, relax.TupleGetItem):
        return _evaluate(expression.tuple_value, values, floats)[expression.index]
    if isinstance(expression, relax.ShapeExpr):
        return tuple(int(extent) for extent in expression.values)
    if isinstance(expression, relax.Call):
        name = getattr(expression.op, "name", str(expression.op))
        arguments = floats.as_summed(name, [_evaluate(argument, values, floats) for argument in expression.args])
        kernel = _KERNELS.get(name)
        if kernel is None:
            return floats.widened(compiled_call(expression, arguments))
        return kernel(arguments, floats.attributes(expression.attrs))
    if isinstance(expression, (tvm.tirx.IntImm, tvm.tirx.FloatImm)):
        return expression.value
    if isinstance(expression, tvm.ir.StringImm):
        return expression.value
    raise DanceError(f"the interpreter cannot evaluate {type(expression).__name__}")


_KERNELS: dict[str, Kernel] = {
    **{f"relax.{name}": on_tensors(function) for name, function in {**UNARY, **BINARY}.items()},
    **{f"relax.nn.{name}": kernel for name, kernel in NEURAL.items()},
    **{f"relax.{name}": kernel for name, kernel in TENSORS.items()},
}
