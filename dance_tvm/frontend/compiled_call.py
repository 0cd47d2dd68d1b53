"""Evaluate a call of a Relax operator by compiling it alone: for operators that PyTorch has no counterpart of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import tvm
from tvm import relax

from dance_tvm.core.errors import DanceError


def compiled_call(mod: tvm.IRModule, call: relax.Call, arguments: Sequence[Any]) -> Any:
    """What ``call`` makes of ``arguments``: tensors, tuples of tensors, or anything else where it is no tensor.

    Functions that the call names are taken from ``mod``. Raises DanceError where TVM cannot compile it.
    """
    name = getattr(call.op, "name", str(call.op))
    params: list[relax.Var] = []
    operands = [
        _operand(given, value, params) if _holds_tensors(value) else given
        for given, value in zip(call.args, arguments, strict=True)
    ]
    try:
        builder = relax.BlockBuilder(mod)
        with builder.function("evaluate", params=params):
            made = relax.Call(call.op, operands, call.attrs, call.ty_args)
            builder.emit_func_output(builder.emit(made))
        alone = builder.get()
        if "main" in {var.name_hint for var in alone.get_global_vars()}:
            del alone["main"]
        machine = relax.VirtualMachine(tvm.compile(alone, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    except Exception as problem:
        raise DanceError(f"The operator {name} cannot be evaluated: TVM compiles it in no form.") from problem
    tensors = [tvm.runtime.tensor(tensor.numpy()) for tensor in _flat(arguments)]
    return _value(machine["evaluate"](*tensors))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, tuple) and bool(value) and all(isinstance(item, torch.Tensor) for item in value)
    )


def _flat(arguments: Sequence[Any]) -> list[torch.Tensor]:
    found = []
    for value in arguments:
        if _holds_tensors(value):
            found += [value] if isinstance(value, torch.Tensor) else list(value)
    return [tensor.contiguous() for tensor in found]


def _operand(given: relax.Expr, value: Any, params: list[relax.Var]) -> relax.Expr:
    """Parameters in place of the tensors in an argument."""
    kinds = [given.ty] if isinstance(value, torch.Tensor) else list(given.ty.fields)
    made = [relax.Var(f"x{len(params) + at}", kind) for at, kind in enumerate(kinds)]
    params += made
    return made[0] if isinstance(value, torch.Tensor) else relax.Tuple(made)


def _value(result: Any) -> Any:
    if isinstance(result, tvm.runtime.Tensor):
        return torch.from_numpy(result.numpy().copy())
    return tuple(_value(part) for part in result)
