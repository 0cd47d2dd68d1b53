"""Evaluate a call of a Relax operator by compiling it by itself, for operators without a counterpart in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import tvm
from tvm import relax

from dance_tvm.core.errors import DanceError


def compiled_call(call: relax.Call, arguments: Sequence[Any]) -> Any:
    """What ``call`` makes of ``arguments``: tensors, tuples of tensors, or anything else where it is no tensor.

    Tensors are taken in the types that ``call`` declares. Raises DanceError where TVM cannot compile it.
    """
    name = getattr(call.op, "name", str(call.op))
    params: list[relax.Var] = []
    operands = [
        _operand(given, value, params) if _holds_tensors(value) else given
        for given, value in zip(call.args, arguments, strict=True)
    ]
    try:
        builder = relax.BlockBuilder()
        with builder.function("evaluate", params=params):
            builder.emit_func_output(builder.emit(relax.Call(call.op, operands, call.attrs, call.ty_args)))
        target = tvm.target.Target({"kind": "llvm"})
        machine = relax.VirtualMachine(tvm.compile(builder.get(), target), tvm.cpu())
    except Exception as problem:
        raise DanceError(f"the interpreter has no counterpart of {name}, and TVM cannot compile it alone") from problem
    arrays = [
        tensor.numpy().astype(str(param.ty.dtype.dtype), copy=False)
        for tensor, param in zip(_flat(arguments), params, strict=True)
    ]
    return _value(machine["evaluate"](*map(tvm.runtime.tensor, arrays)))


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
