"""One piece of memory for what lives during a call: tensors between kernels, and what kernels take for themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx

from dance_tvm.artifact.weight_store import ALIGNMENT

#: TVM puts buffers of up to so many bytes on the stack.
STACK_BYTES = 1024


@dataclass
class Storage:
    """A piece of the arena, in use from step ``first`` to step ``last``."""

    bytes: int
    first: int = -1
    last: int = -1
    offset: int = 0


def lay_out(storages: Sequence[Storage], alignment: int = ALIGNMENT) -> None:
    """Give each storage the lowest offset where no other one lies that is in use at the same time, large ones first."""
    placed: list[Storage] = []
    for storage in sorted((each for each in storages if each.first >= 0), key=lambda each: -each.bytes):
        at = 0
        for other in sorted(placed, key=lambda each: each.offset):
            meets = other.first <= storage.last and storage.first <= other.last
            if meets and at < other.offset + other.bytes and other.offset < at + storage.bytes:
                end = other.offset + other.bytes
                at = end + (-end % alignment)
        storage.offset = at
        placed.append(storage)


def workspace_bytes(kernel: tirx.PrimFunc) -> int:
    """What a processor's kernel allocates for a whole call, as the runtime rounds it; within its loops it allocates
    little, each thread for itself."""
    sizes = [_bytes(each.buffer) for each in _statements(kernel.body) if isinstance(each, tirx.AllocBuffer)]
    return sum(size + -size % ALIGNMENT for size in sizes if size > STACK_BYTES)


def _bytes(buffer: tirx.Buffer) -> int:
    if not all(isinstance(extent, tirx.IntImm) for extent in buffer.shape):
        return 0
    return math.prod(int(extent) for extent in buffer.shape) * -(-buffer.dtype.bits // 8)


def _statements(node: Any) -> Iterator[Any]:
    """The statements of a kernel outside its loops."""
    if isinstance(node, tirx.SeqStmt):
        for each in node.seq:
            yield from _statements(each)
    elif isinstance(node, s_tir.SBlockRealize):
        yield from _statements(node.block.body)
    elif isinstance(node, tirx.AttrStmt):
        yield from _statements(node.body)
    else:
        yield node
