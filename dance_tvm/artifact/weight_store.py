"""The store: what an artifact keeps of its weights, each once, at offsets that a library can map.

A kernel's packed weights are not kept where they follow from the layer's own (`schedules/preparation.py`): the library
packs them when a model is created. Equal tensors are stored once, and of tensors with many zeros only the others. The
store lies within the library, or in a file beside it that any reader of safetensors can read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from dance_tvm.schedules.preparation import Source, array_digest

Encoding = Literal["PLAIN", "SPARSE", "HALF", "DELTAS"]

ALIGNMENT = 64
#: Where a file's tensors begin: pages of this size are mapped.
PAGE = 4096
#: Stores up to this size lie within the library: small networks are handier as one file.
MOST_INLINE = 16 << 20
#: Tensors of fewer bytes are stored as they are.
SMALL_BYTES = 4096
#: Something shorter is stored where it takes at most this share.
WORTHWHILE = 0.9
#: Elements of one block (prepare.c).
BLOCK = 4096
#: Bytes of one leaf of the hash tree (digest.c).
CHUNK = 1 << 17

_SAFETENSORS = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """One tensor that kernels read: where its source lies in the store and what is made of it (`program.h`)."""

    offset: int
    stored: int
    source: int
    bytes: int
    encoding: Encoding = "PLAIN"
    preparation: str = "AS_STORED"
    sizes: tuple[int, ...] = ()
    transforms: tuple[float, ...] = ()


@dataclass
class Store:
    """``tensors`` in the order of the program's weights; ``names`` of what lies in the file, empty where it is inline.

    ``data`` is what is written: the whole file, or what the library holds.
    """

    tensors: list[Stored]
    data: list[bytes]
    names: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of the store."""
        return sum(map(len, self.data))

    def write(self, path: Path) -> None:
        """Write the store to a file."""
        with path.open("wb") as stream:
            stream.writelines(self.data)

    def digest(self) -> bytes:
        """SHA-256 over the SHA-256 of each 128 KiB, as digest.c computes it."""
        leaves, hashed, length = [], hashlib.sha256(), 0
        for piece in self.data:
            view = memoryview(piece)
            while len(view):
                taken = min(len(view), CHUNK - length)
                hashed.update(view[:taken])
                view, length = view[taken:], length + taken
                if length == CHUNK:
                    leaves.append(hashed.digest())
                    hashed, length = hashlib.sha256(), 0
        if length:
            leaves.append(hashed.digest())
        return hashlib.sha256(b"".join(leaves)).digest()


def store_of(
    arrays: Sequence[np.ndarray],
    sources: Mapping[bytes, Source],
    most_inline: int = MOST_INLINE,
    *,
    halve: bool = False,
) -> Store:
    """A store for ``arrays``, of which those in ``sources`` (by digest) are packed when a model is created.

    ``halve``: matrices of float32 are rounded to half precision.
    """
    writer = _Writer(halve)
    for array in arrays:
        writer.add(array, sources.get(array_digest(array)))
    return writer.store(most_inline)


class _Writer:
    """Collects pieces and where they lie, offsets from the first tensor on."""

    def __init__(self, halve: bool) -> None:
        self.halve = halve
        self.pieces: list[bytes] = []
        self.header: dict[str, dict[str, object]] = {}
        self.names: list[str] = []
        self.length = 0
        self.tensors: list[Stored] = []
        self._placed: dict[bytes, tuple[int, int, Encoding]] = {}

    def add(self, array: np.ndarray, source: Source | None) -> None:
        """One tensor that kernels read."""
        if source is None:
            offset, stored, encoding = self._place(array)
            self.tensors.append(Stored(offset, stored, array.nbytes, array.nbytes, encoding))
            return
        offset, stored, encoding = self._place(source.weight)
        how = source.preparation
        self.tensors.append(
            Stored(offset, stored, source.weight.nbytes, array.nbytes, encoding, how.kind, how.sizes, how.transforms)
        )

    def _place(self, array: np.ndarray) -> tuple[int, int, Encoding]:
        key = array_digest(array)
        if key not in self._placed:
            data, encoding = self._encoded(array)
            shape = [len(data)] if encoding in ("SPARSE", "DELTAS") else list(array.shape)
            dtype = {"SPARSE": "U8", "DELTAS": "U8", "HALF": "F16"}.get(encoding) or _SAFETENSORS[str(array.dtype)]
            name = f"weight_{len(self.names):03d}"
            self.names.append(name)
            self._placed[key] = self.length, len(data), encoding
            self._append(name, data, dtype, shape)
            if pad := -self.length % ALIGNMENT:  # a tensor too, as the format allows no holes
                self._append(f"pad_{len(self.names) - 1:03d}", bytes(pad), "U8", [pad])
        return self._placed[key]

    def _encoded(self, array: np.ndarray) -> tuple[bytes, Encoding]:
        """The shortest form of a large tensor."""
        plain = np.ascontiguousarray(array)
        if array.nbytes < SMALL_BYTES or array.dtype.itemsize != 4:
            return plain.tobytes(), "PLAIN"
        forms: dict[Encoding, bytes] = {"PLAIN": plain.tobytes()}
        if array.dtype == np.float32 and self.halve and array.ndim > 1:
            return plain.astype("float16").tobytes(), "HALF"
        words = plain.reshape(-1).view("uint32")
        if array.dtype == np.int32:
            forms["DELTAS"] = _deltas(words)
        elif (words != 0).mean() + 1 / 32 <= WORTHWHILE:
            forms["SPARSE"] = _sparse(words, words.size // len(plain))
        best = min(forms, key=lambda form: len(forms[form]))
        if len(forms[best]) > WORTHWHILE * array.nbytes:
            best = "PLAIN"
        return forms[best], best

    def _append(self, name: str, data: bytes, dtype: str, shape: list[int]) -> None:
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self.length, self.length + len(data)]}
        self.pieces.append(data)
        self.length += len(data)

    def store(self, most_inline: int) -> Store:
        if self.length <= most_inline:
            return Store(self.tensors, self.pieces)
        header = json.dumps(self.header, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % PAGE)
        begin = 8 + len(header)
        moved = [Stored(**{**vars(each), "offset": each.offset + begin}) for each in self.tensors]
        return Store(moved, [len(header).to_bytes(8, "little"), header, *self.pieces], self.names)


def _sparse(words: np.ndarray, row: int) -> bytes:
    """The elements of a ``row``, how many rows after one another have their zeros in the same places, as kernel groups
    have, and how many values come before each block; a bit for each element of the first of such rows; and the elements
    that are not zero."""
    kept = words != 0
    rows = kept.reshape(-1, row)
    alike = next(count for count in (32, 16, 8, 4, 2, 1) if _repeats(rows, count))
    starts = np.arange(0, len(words), BLOCK)
    before = np.cumsum([0, *np.add.reduceat(kept, starts, dtype="int64")[:-1]])
    head = np.array([row, alike, *before], "uint32").tobytes()
    bits = np.packbits(rows[::alike].reshape(-1), bitorder="little").tobytes()
    return b"".join(part + bytes(-len(part) % ALIGNMENT) for part in (head, bits)) + words[kept].tobytes()


def _repeats(rows: np.ndarray, count: int) -> bool:
    """Whether each ``count`` rows are alike; the last ones may be fewer."""
    return all(bool((rows[first : first + count] == rows[first]).all()) for first in range(0, len(rows), count))


def _deltas(words: np.ndarray) -> bytes:
    """For each block its first element, and where its bytes begin, times eight, plus how many each element takes; then
    what each element adds to the one before, the sign in the lowest bit. Lists of rows ascend, mostly by little."""
    table, packed, length = [], [], 0
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK]
        steps = np.diff(block, prepend=block[:1]).view("int32")
        folded = ((steps << 1) ^ (steps >> 31)).view("uint32")
        width = max(1, -(-int(folded.max()).bit_length() // 8))
        table.append([int(block[0]), length * 8 + width])
        packed.append(np.ascontiguousarray(folded.view("uint8").reshape(-1, 4)[:, :width]).tobytes())
        length += len(packed[-1])
    head = np.array(table, "uint32").tobytes()
    return head + bytes(-len(head) % ALIGNMENT) + b"".join(packed)
