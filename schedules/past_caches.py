"""Stores of whole vectors that go to memory past the caches, on x86.

A plain store brings its line into the caches first, and a core that reads as much besides waits for lines to leave
them. TVM has no such store, so that it is a function in LLVM's own language, which comes with the kernel
(:func:`.elementary.written_out`). Other threads see what was stored after a :func:`fence`.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from . import operators
from .emit import Expr

#: The operator's name without ``dance.``.
NAME = "store_past_caches"
#: Lanes of SSE, AVX2 and AVX-512.
WIDTHS = (4, 8, 16)
#: Floats of a cache line: lines that are not stored whole take longer so than by plain stores.
LINE_FLOATS = 16


def store_past_caches(buffer: tirx.Buffer, value: Expr, start: Expr) -> None:
    """Store a float32 vector at ``buffer[start]``, which is aligned to the vector's size."""
    T.evaluate(operators.call(NAME, [tirx.address_of(buffer[start]), value], "void"))


def fence() -> None:
    """Let other threads see what was stored so before anything that is stored behind it."""
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.x86.sse.sfence"))


def text() -> str:
    """The functions in LLVM's language."""
    stores = [
        f"define void @{_symbol(lanes)}(ptr %at, <{lanes} x float> %value) {{\n"
        f"  store <{lanes} x float> %value, ptr %at, align {4 * lanes}, !nontemporal !0\n  ret void\n}}"
        for lanes in WIDTHS
    ]
    return "\n".join([*stores, "!0 = !{i32 1}"])


def _symbol(lanes: int) -> str:
    return f"dance_{NAME}_f32x{lanes}"


def _lower(call: tvm.ir.Call) -> tvm.ir.Call:
    return tirx.call_extern("void", _symbol(int(call.args[1].ty.dtype.lanes)), *call.args)


operators.define(NAME, "a store past the caches", {"llvm": _lower}, pure=False)
