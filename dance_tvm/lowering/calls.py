"""Calls of kernels in a Relax function."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax

from dance_tvm.schedules.kernel import Kernel


def call_kernel(builder: relax.BlockBuilder, kernel: Kernel, args: Mapping[str, relax.Expr], threads: int) -> relax.Var:
    """Emit a call of ``kernel``, which uses at most ``threads``, with what it reads by the names of its operands;
    several outputs are a tuple."""
    func = kernel.primfunc(one_thread=threads == 1).without_attr("global_symbol")
    function = builder.add_func(func, kernel.name)
    types = [relax.TensorType(list(each.shape), each.dtype) for each in kernel.outputs()]
    call = relax.call_tir(
        function, [args[each.name] for each in kernel.inputs()], types[0] if len(types) == 1 else types
    )
    return builder.emit(call, name_hint=kernel.name)
