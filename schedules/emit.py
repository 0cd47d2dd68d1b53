"""A thin layer over TVM's IR builder: the operations that all kernels of this folder share.

Kernels are written as ordinary Python that emits TIR: Python loops unroll, ``serial`` and ``parallel`` loops stay.
Loops start at zero: a loop whose first index is read from a buffer loses that offset in nested loops (TVM 0.27).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .bounds import larger, smaller

#: An expression of TIR; Python's numbers stand for constants.
Expr: TypeAlias = tirx.Expr

FLOAT = "float32"
HALF = "float16"
INT = "int32"
BIG_INT = "int64"

#: Relax's pattern kind of functions that it must not fuse with others; saves it the analysis of long bodies.
OPAQUE = 8

#: The attribute of a PrimFunc under construction that stays on the thread which calls it.
_ONE_THREAD = "dance.one_thread"


class Built:
    """A PrimFunc under construction; ``func`` is there once its ``kernel`` block has ended."""

    func: tirx.PrimFunc


@contextmanager
def kernel(name: str, attrs: Mapping[str, str] | None = None, one_thread: bool = False) -> Iterator[Built]:
    """Open a PrimFunc called ``name``, with ``attrs`` beside the attributes that all have.

    ``one_thread``: it never wakes another thread, which costs more than a small kernel takes.
    """
    built = Built()
    usual = {"tir.noalias": True, "global_symbol": name, "tirx.is_scheduled": True, "op_pattern": OPAQUE}
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({**usual, **(attrs or {}), _ONE_THREAD: one_thread})
            yield built
        func = builder.get()
    # Relax looks for a root block in every function that it calls.
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", func.body))
    built.func = func.with_body(root).without_attr(_ONE_THREAD)


def argument(name: str, shape: Sequence[int], dtype: str = FLOAT) -> tirx.Buffer:
    """Declare the next parameter of the kernel; extents are Relax's own int64, so that kernels can be joined."""
    return T.arg(name, T.buffer(tuple(tirx.IntImm(BIG_INT, int(extent)) for extent in shape), dtype))


def flat(buffer: tirx.Buffer) -> tirx.Buffer:
    """The same memory seen as one dimension."""
    size = 1
    for extent in buffer.shape:
        size *= int(extent)
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data)


def scratch(shape: Sequence[int], dtype: str = FLOAT) -> tirx.Buffer:
    """Memory of the enclosing loop body: under 1 KiB it lives on the stack, so LLVM keeps it in registers."""
    return T.alloc_buffer(tuple(int(extent) for extent in shape), dtype)


def let(value: Expr) -> Expr:
    """Evaluate once and name the result."""
    return T.Bind(value)


def big(value: Expr) -> Expr:
    """Widen an index, so that address arithmetic is not sign-extended again in the innermost loop."""
    return tirx.Cast(BIG_INT, value)


def lanes(start: Expr, count: int) -> Expr:
    """Consecutive indices ``start, start + 1, …``."""
    return tirx.Ramp(start, 1, count) if count > 1 else start


def splat(value: Expr, count: int) -> Expr:
    """The same value in every lane."""
    return tirx.Broadcast(value, count) if count > 1 else value


def lane(vector: Expr, index: int) -> Expr:
    """One lane of a vector."""
    return tirx.Shuffle([vector], [index])


def splat_lane(vector: Expr, index: int, of: int, count: int) -> Expr:
    """One lane of a vector of ``of`` lanes in each of ``count``: a shuffle where it can be, since of lanes that are
    taken out one by one LLVM makes as many loads."""
    return tirx.Shuffle([vector], [index] * count) if of == count else splat(lane(vector, index), count)


def number(value: float, count: int = 1, dtype: str = FLOAT) -> Expr:
    """A constant in ``count`` lanes."""
    return splat(tirx.FloatImm(dtype, value), count)


def store(buffer: tirx.Buffer, value: Expr, *index: Expr) -> None:
    """Write ``value`` to ``buffer[index]``."""
    T.buffer_store(buffer, value, list(index))


def read(buffer: tirx.Buffer, start: Expr, count: int = 1) -> Expr:
    """``count`` consecutive elements as float32, whatever they are stored as."""
    value = buffer[lanes(start, count)]
    return value if buffer.dtype == FLOAT else cast(value, FLOAT, count)


def write(buffer: tirx.Buffer, value: Expr, start: Expr, count: int = 1) -> None:
    """Store ``count`` consecutive float32 values as what ``buffer`` holds."""
    if buffer.dtype != FLOAT:
        value = cast(value, str(buffer.dtype), count)
    store(buffer, value, lanes(start, count))


def cast(value: Expr, dtype: str, count: int = 1) -> Expr:
    """``count`` lanes as another type."""
    return tirx.Cast(dtype + (f"x{count}" if count > 1 else ""), value)


def short(dtype: str) -> str:
    """A type's name as kernels' names have it."""
    return {FLOAT: "f32", HALF: "f16"}[dtype]


def clear(buffer: tirx.Buffer) -> None:
    """Set all of ``buffer`` to zero: what is computed when compiling must not hold memory that was never written."""
    memory = flat(buffer)
    with serial(int(memory.shape[0])) as i:
        store(memory, tirx.const(0, buffer.dtype), i)


def prefetch(buffer: tirx.Buffer, index: Expr) -> None:
    """Ask for the cache line of ``buffer[index]`` to be brought near; an address past the end does no harm."""
    read, second_level, data = (tirx.IntImm(INT, value) for value in (0, 2, 1))
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", tirx.address_of(buffer[index]), read, second_level, data))


def serial(extent: Expr) -> Any:
    """A loop from zero that stays a loop."""
    return T.serial(0, extent)


def parallel(extent: Expr) -> Any:
    """A loop from zero whose iterations are shared out over threads, unless the kernel stays on one."""
    function = IRBuilder.current().frames[0]
    return T.serial(0, extent) if function.attrs[_ONE_THREAD] else T.parallel(0, extent)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Run the body only where ``condition`` holds."""
    with T.If(condition), T.Then():
        yield


def choose(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Run one of two bodies."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def ceil_div(value: Expr, by: int) -> Expr:
    """``ceil(value / by)`` for values that are not negative."""
    return tirx.floordiv(value + (by - 1), by)


def at_least(bound: float, x: Expr, count: int, dtype: str = FLOAT) -> Expr:
    """``max(x, bound)`` that leaves NaN as it is; ``tirx.max`` would make the bound of it."""
    return larger(x, number(bound, count, dtype))


def at_most(bound: float, x: Expr, count: int) -> Expr:
    """``min(x, bound)`` that leaves NaN as it is."""
    return smaller(x, number(bound, count))


Activation = Callable[[Expr, int], Expr]


#: Activations that a convolution applies to its results before it stores them, by the name of the Relax operator.
ACTIVATIONS: dict[str, Activation] = {
    "": lambda x, count: x,
    "relu": lambda x, count: at_least(0.0, x, count),
    "relu6": lambda x, count: at_most(6.0, at_least(0.0, x, count), count),
    "sigmoid": lambda x, _: tirx.sigmoid(x),
    "silu": lambda x, _: x * tirx.sigmoid(x),
}
