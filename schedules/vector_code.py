"""Functions over vectors in LLVM's language, line by line: there a value that is read twice has a name."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

FLOAT, INT, BOOL = "float", "i32", "i1"
DOUBLE, LONG = "double", "i64"
WHOLE = (INT, LONG)
BITS = {FLOAT: 32, DOUBLE: 64}
NAMES = {"+": ("fadd", "add"), "-": ("fsub", "sub"), "*": ("fmul", "mul"), "/": ("fdiv", "sdiv")}
#: Lanes of a register of NEON's.
NEON_LANES = 4


class Body:
    """The lines of one function over vectors of ``lanes``, for Arm processors alone if ``neon``."""

    def __init__(self, lanes: int, neon: bool) -> None:
        self.lanes, self.neon = lanes, neon
        self.lines: list[str] = []

    def type(self, kind: str) -> str:
        """LLVM's name for a vector of ``kind``."""
        return f"<{self.lanes} x {kind}>" if self.lanes > 1 else kind

    def add(self, kind: str, text: str) -> Value:
        """Name the result of an instruction."""
        name = f"%v{len(self.lines)}"
        self.lines.append(f"  {name} = {text}")
        return Value(self, name, kind)

    def operand(self, value: Value | float, kind: str) -> str:
        """A value by its name, or a number in all lanes."""
        if isinstance(value, Value):
            return value.name
        if kind in WHOLE:
            number = str(int(value))
        else:  # LLVM writes a float32 by the bits of the float64 that equals it
            rounded = struct.unpack("f", struct.pack("f", value))[0] if kind == FLOAT else value
            number = f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
        return f"splat ({kind} {number})" if self.lanes > 1 else number

    def constant(self, value: float, kind: str) -> Value:
        """A number in all lanes."""
        return Value(self, self.operand(value, kind), kind)

    def call(self, name: str, first: Value, *others: Value | float) -> Value:
        """A function of LLVM's own, ``llvm.NAME``, of values of one kind, which gives one of the same."""
        kind = self.type(first.kind)
        operands = ", ".join(f"{kind} {self.operand(each, first.kind)}" for each in (first, *others))
        function = f"@llvm.{name}.{f'v{self.lanes}' if self.lanes > 1 else ''}f{BITS[first.kind]}"
        return self.add(first.kind, f"call {kind} {function}({operands})")

    def mended(self, found: Value, wrong: Value, function: Callable[[], Value]) -> Value:
        """``found``, but what ``function`` computes in the lanes where ``wrong`` holds: behind a jump, for it is rare.
        Once in a body, whose first block is called ``entry``."""
        any_ = wrong.name
        if self.lanes > 1:
            any_ = f"%v{len(self.lines)}"
            reduce = f"@llvm.vector.reduce.or.v{self.lanes}i1({self.type(BOOL)} {wrong.name})"
            self.lines.append(f"  {any_} = call i1 {reduce}")
        self.lines += [f"  br i1 {any_}, label %mending, label %done", "mending:"]
        other = select(wrong, function(), found)
        self.lines += ["  br label %done", "done:"]
        ways = f"[ {found.name}, %entry ], [ {other.name}, %mending ]"
        return self.add(found.kind, f"phi {self.type(found.kind)} {ways}")


class Value:
    """A vector that has a name."""

    def __init__(self, body: Body, name: str, kind: str) -> None:
        self.body, self.name, self.kind = body, name, kind

    def _apply(self, instruction: str, left: Value | float, right: Value | float, result: str) -> Value:
        body = self.body
        operands = f"{body.operand(left, self.kind)}, {body.operand(right, self.kind)}"
        return body.add(result, f"{instruction} {body.type(self.kind)} {operands}")

    def _arithmetic(self, sign: str, left: Value | float, right: Value | float) -> Value:
        return self._apply(NAMES[sign][self.kind in WHOLE], left, right, self.kind)

    def __add__(self, other: Value | float) -> Value:
        return self._arithmetic("+", self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self._arithmetic("-", self, other)

    def __rsub__(self, other: float) -> Value:
        return self._arithmetic("-", other, self)

    def __mul__(self, other: Value | float) -> Value:
        return self._arithmetic("*", self, other)

    def __truediv__(self, other: Value) -> Value:
        return self._arithmetic("/", self, other)

    def __rtruediv__(self, other: float) -> Value:
        return self._arithmetic("/", other, self)

    def shifted(self, bits: int) -> Value:
        """An integer times 2^bits; below zero the sign moves along."""
        return self._apply("shl" if bits > 0 else "ashr", self, abs(bits), self.kind)

    def without_low(self, bits: int) -> Value:
        """An integer over 2^bits, read as one without a sign: one instruction for 64 bits too."""
        return self._apply("lshr", self, bits, self.kind)

    def masked(self, bits: Value | int) -> Value:
        """An integer's bits that ``bits`` has."""
        return self._apply("and", self, bits, self.kind)

    def flipped(self, bits: Value) -> Value:
        """A number of 64 bits with those of its bits turned that the integer ``bits`` has."""
        own = self.seen_as(LONG)
        return own._apply("xor", own, bits, LONG).seen_as(self.kind)

    def has_bit(self, bit: int) -> Value:
        """Whether an integer has this bit."""
        low = self.masked(1 << bit)
        return low._apply("icmp ne", low, 0, BOOL)

    def below_zero(self) -> Value:
        """Whether an integer is: of a float's bits, whether its sign is minus."""
        return self._apply("icmp slt", self, 0, BOOL)

    def compared(self, how: str, other: Value | float) -> Value:
        """``olt``, ``ogt``, ``oeq``: false for NaN."""
        return self._apply(f"fcmp {how}", self, other, BOOL)

    def seen_as(self, kind: str) -> Value:
        """The same bits."""
        return self.body.add(kind, f"bitcast {self.body.type(self.kind)} {self.name} to {self.body.type(kind)}")

    def lanes_from(self, first: int, count: int) -> Value:
        """``count`` of a float's lanes."""
        if count == self.body.lanes:
            return self
        kind = self.body.type(FLOAT)
        return self.body.add(FLOAT, f"shufflevector {kind} {self.name}, {kind} poison, {_places(first, count)}")

    def wide(self) -> Value:
        """A float32 as a float64."""
        return self.body.add(DOUBLE, f"fpext {self.body.type(FLOAT)} {self.name} to {self.body.type(DOUBLE)}")

    def rounded(self) -> Value:
        """A float64 as the nearest float32."""
        return self.body.add(FLOAT, f"fptrunc {self.body.type(DOUBLE)} {self.name} to {self.body.type(FLOAT)}")

    def as_float(self) -> Value:
        """An integer as a float."""
        return self.body.add(FLOAT, f"sitofp {self.body.type(INT)} {self.name} to {self.body.type(FLOAT)}")


def select(condition: Value, then: Value | float, otherwise: Value | float) -> Value:
    """``then`` where the condition holds, else ``otherwise``."""
    body = condition.body
    of = next((each.kind for each in (then, otherwise) if isinstance(each, Value)), FLOAT)
    kind, first, second = body.type(of), body.operand(then, of), body.operand(otherwise, of)
    return body.add(of, f"select {body.type(BOOL)} {condition.name}, {kind} {first}, {kind} {second}")


def clamped(x: Value, least: float, most: float) -> Value:
    """``x`` between two numbers; NaN stays."""
    x = select(x.compared("olt", least), least, x)
    return select(x.compared("ogt", most), most, x)


def polynomial(x: Value, factors: Sequence[float]) -> Value:
    """By Horner's rule, the factor of the highest power first."""
    value = x * factors[0] + factors[1]
    for factor in factors[2:]:
        value = value * x + factor
    return value


def neon_instruction(name: str, *values: Value) -> Value:
    """An instruction of NEON on vectors of any width: LLVM's functions for them know those of a register alone."""
    body = values[0].body
    count = min(body.lanes, NEON_LANES)
    one = f"<{count} x {FLOAT}>" if count > 1 else FLOAT
    function = f"@llvm.aarch64.neon.{name}.{f'v{count}' if count > 1 else ''}f32"
    parts = []
    for first in range(0, body.lanes, count):
        operands = [value.lanes_from(first, count).name for value in values]
        parts.append(body.add(FLOAT, f"call {one} {function}({', '.join(f'{one} {each}' for each in operands)})"))
    while len(parts) > 1:
        parts = [_joined(*pair, count) for pair in zip(parts[::2], parts[1::2], strict=True)]
        count *= 2
    return parts[0]


def _joined(left: Value, right: Value, count: int) -> Value:
    """Two vectors of ``count`` lanes as one."""
    kind = f"<{count} x {FLOAT}>"
    return left.body.add(FLOAT, f"shufflevector {kind} {left.name}, {kind} {right.name}, {_places(0, 2 * count)}")


def _places(first: int, count: int) -> str:
    return f"<{count} x i32> <{', '.join(f'i32 {first + each}' for each in range(count))}>"
