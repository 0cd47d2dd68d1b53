"""What GPU kernels say again and again, beside :mod:`..emit`: launches, shared memory, registers, barriers, scans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ..emit import FLOAT, INT, Expr, lane, let, serial, splat, store, when

#: Threads of a block that plans lists or walks elements.
BLOCK = 256
#: Lanes of one vector load.
QUAD = 4


@contextmanager
def launch(blocks: int, threads: int) -> Iterator[tuple[Expr, Expr]]:
    """One kernel launch: (block, thread). Launches of a function run one after the other.

    Barriers are where the kernel says; TVM would add its own, even under conditions that one thread alone meets.
    """
    with (
        T.launch_thread("blockIdx.x", blocks) as block,
        T.launch_thread("threadIdx.x", threads) as thread,
        T.attr(integer(0), "hand_threaded", integer(1)),
    ):
        yield block, thread


@contextmanager
def each_element(count: int) -> Iterator[Expr]:
    """A launch with one thread for each of ``count`` elements."""
    with launch(-(-count // BLOCK), BLOCK) as (block, thread):
        index = let(block * BLOCK + thread)
        with when(index < count):
            yield index


def shared(shape: Sequence[int], dtype: str = FLOAT) -> tirx.Buffer:
    """Memory of one block of threads."""
    return T.alloc_buffer(tuple(int(extent) for extent in shape), dtype, scope="shared")


def registers(shape: Sequence[int], dtype: str = FLOAT) -> tirx.Buffer:
    """Memory of one thread, held in registers where every index is a constant."""
    return T.alloc_buffer(tuple(int(extent) for extent in shape), dtype, scope="local")


def barrier() -> None:
    """Wait for all threads of the block; all must get here."""
    T.evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def integer(value: int) -> Expr:
    """An int32 constant."""
    return tirx.IntImm(INT, value)


def pick(condition: Expr, value: Expr, otherwise: Expr) -> Expr:
    """``value`` where ``condition`` holds, else ``otherwise``; only the chosen one is evaluated."""
    return tirx.if_then_else(condition, value, otherwise)


def parts(vector: Expr, count: int) -> list[Expr]:
    """The lanes of a vector of ``count``."""
    return [lane(vector, index) for index in range(count)] if count > 1 else [vector]


def zeros(count: int) -> Expr:
    """Zero in every lane."""
    return splat(tirx.FloatImm(FLOAT, 0.0), count)


def exclusive_scan(thread: Expr, value: Expr, memory: tirx.Buffer) -> tuple[Expr, Expr]:
    """Over the block: the sum of ``value`` of all threads before this one, and of all threads.

    ``memory``: int32 (BLOCK,) of shared memory, free to be overwritten by whoever comes after a barrier.
    """
    store(memory, value, thread)
    barrier()
    with serial((BLOCK - 1).bit_length()) as turn:
        distance = let(tirx.shift_left(integer(1), turn))
        before = let(pick(thread >= distance, memory[tirx.max(thread - distance, 0)], integer(0)))
        barrier()
        store(memory, memory[thread] + before, thread)
        barrier()
    return let(memory[thread] - value), let(memory[BLOCK - 1])


def compact(thread: Expr, length: int, alive: Callable[[Expr], Expr], visit: Callable[[Expr, Expr], None]) -> Expr:
    """Call ``visit(slot, index)`` for every index below ``length`` that is alive; returns how many those are.

    Each thread takes one run of consecutive indices, so slots keep the order of indices.
    """
    run = -(-length // BLOCK)
    memory, count = shared((BLOCK,), INT), registers((1,), INT)
    first = let(thread * run)

    def each(action: Callable[[Expr], None]) -> None:
        with serial(tirx.min(run, tirx.max(length - first, 0))) as offset:
            index = let(first + offset)
            with when(alive(index)):
                action(index)

    store(count, integer(0), 0)
    each(lambda _index: store(count, count[0] + 1, 0))
    slot, total = exclusive_scan(thread, let(count[0]), memory)
    store(count, slot, 0)

    def list_it(index: Expr) -> None:
        visit(let(count[0]), index)
        store(count, count[0] + 1, 0)

    each(list_it)
    return total
