"""Recurrent layers of ONNX, their steps one after another: RNN, GRU and LSTM in every form the standard has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from dance_tvm.frontend.onnx_conversions.operator import Conversion, Operator, UnsupportedError, dtype_of, shape_of

#: Layers with more steps than this are not unrolled.
MOST_STEPS = 512

Activation = Callable[[Any], Any]


@dataclass
class _Cell:
    """One direction of a layer: its weights as its steps read them."""

    op: Operator
    hidden: int
    recurrent: Any  # hidden, gates * hidden
    inner_bias: Any  # of GRU's candidate where the reset gate scales it too; None elsewhere
    peepholes: Any  # of LSTM's gates i, o, f, one behind the other; None where it has none
    activations: list[Activation]

    def activated(self, at: int, x: Any) -> Any:
        """The activation ``at`` of a gate's sum, which the layer may clip."""
        most = self.op.number("clip", 0.0)
        return self.activations[at](self.op.emit(relax.op.clip(x, -most, most)) if most else x)

    def gate(self, x: Any, first: int, last: int | None = None) -> Any:
        """The part of ``x`` that belongs to a gate, or to all from ``first`` to before ``last``."""
        return _part(self.op, x, -1, first * self.hidden, (first + 1 if last is None else last) * self.hidden)

    def add(self, a: Any, b: Any) -> Any:
        return self.op.emit(relax.op.add(a, b))

    def times(self, a: Any, b: Any) -> Any:
        return self.op.emit(relax.op.multiply(a, b))

    def product(self, a: Any, weights: Any) -> Any:
        return self.op.emit(relax.op.matmul(a, weights))

    def rest(self, x: Any) -> Any:
        """``1 - x``."""
        return self.op.emit(relax.op.subtract(self.op.like(1, x), x))


#: The next states, the hidden one first, from what a step's input gives to the gates and the states before it.
Step = Callable[[_Cell, Any, list[Any]], list[Any]]


def _rnn(cell: _Cell, given: Any, states: list[Any]) -> list[Any]:
    return [cell.activated(0, cell.add(given, cell.product(states[0], cell.recurrent)))]


def _gru(cell: _Cell, given: Any, states: list[Any]) -> list[Any]:
    (h,) = states
    if cell.op.flag("linear_before_reset"):
        products = cell.product(h, cell.recurrent)
        both, inner = cell.gate(products, 0, 2), cell.gate(products, 2)
        inner = inner if cell.inner_bias is None else cell.add(inner, cell.inner_bias)
    else:
        both, inner = cell.product(h, cell.gate(cell.recurrent, 0, 2)), None
    both = cell.activated(0, cell.add(cell.gate(given, 0, 2), both))
    update, reset = cell.gate(both, 0), cell.gate(both, 1)
    if inner is None:
        inner = cell.product(cell.times(reset, h), cell.gate(cell.recurrent, 2))
    else:
        inner = cell.times(reset, inner)
    candidate = cell.activated(1, cell.add(cell.gate(given, 2), inner))
    return [cell.add(cell.times(cell.rest(update), candidate), cell.times(update, h))]


def _lstm(cell: _Cell, given: Any, states: list[Any]) -> list[Any]:
    h, c = states
    sums = cell.add(given, cell.product(h, cell.recurrent))
    into, out, forget, candidate = (cell.gate(sums, at) for at in range(4))
    if cell.peepholes is not None:
        into = cell.add(into, cell.times(cell.gate(cell.peepholes, 0), c))
        forget = cell.add(forget, cell.times(cell.gate(cell.peepholes, 2), c))
    into = cell.activated(0, into)
    forget = cell.rest(into) if cell.op.flag("input_forget") else cell.activated(0, forget)
    c = cell.add(cell.times(forget, c), cell.times(into, cell.activated(1, candidate)))
    if cell.peepholes is not None:
        out = cell.add(out, cell.times(cell.gate(cell.peepholes, 1), c))
    return [cell.times(cell.activated(0, out), cell.activations[2](c)), c]


def _recurrent(step: Step, gates: int, states: int, usual: tuple[str, ...]) -> Conversion:
    """A layer of cells with ``gates`` and ``states`` whose activations are the ``usual`` ones where it names none."""

    def convert(op: Operator) -> list[Any]:
        x, by_batch = op.input(0), op.flag("layout")
        x = op.emit(relax.op.permute_dims(x, [1, 0, 2])) if by_batch else x
        if shape_of(x)[0] > MOST_STEPS:
            raise UnsupportedError(f"runs more than {MOST_STEPS} steps", "export the network with a shorter sequence")
        ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[op.text("direction", "forward")]
        named = _activations(op, [name.encode() for name in usual] * len(ways))
        hidden, whole, last = shape_of(op.input(2))[-1], [], []
        for at, backwards in enumerate(ways):
            chosen = named[at * len(usual) : (at + 1) * len(usual)]
            cell, given = _cell(op, x, at, gates, hidden, chosen)
            first = [_first_state(op, 5 + index, at, x, hidden) for index in range(states)]
            rows, final = _walked(cell, step, given, first, backwards)
            whole.append(_stacked(op, rows, 0))
            last.append(final)
        # steps, directions, batch, hidden and directions, batch, hidden; with the batch first where the layer is so
        y = _stacked(op, whole, 1)
        ends = [_stacked(op, list(each), 0) for each in zip(*last, strict=True)]
        if by_batch:
            y = op.emit(relax.op.permute_dims(y, [2, 0, 1, 3]))
            ends = [op.emit(relax.op.permute_dims(end, [1, 0, 2])) for end in ends]
        return [y, *ends]

    return convert


def _cell(op: Operator, x: Any, at: int, gates: int, hidden: int, activations: list[Activation]) -> tuple[_Cell, Any]:
    """A direction's cell, and what the inputs of all steps give to its gates."""
    given = op.emit(relax.op.matmul(x, _transposed(op, _row(op, op.input(1), at))))
    recurrent, inner = _transposed(op, _row(op, op.input(2), at)), None
    if op.input(3) is not None:
        both = _row(op, op.input(3), at)
        ours, theirs = (_part(op, both, 0, start * gates * hidden, (start + 1) * gates * hidden) for start in (0, 1))
        if op.flag("linear_before_reset"):
            inner, kept = _part(op, theirs, 0, 2 * hidden, 3 * hidden), _part(op, theirs, 0, 0, 2 * hidden)
            added = op.emit(relax.op.concat([kept, op.constant(np.zeros(hidden), dtype_of(kept))], 0))
        else:
            added = theirs
        given = op.emit(relax.op.add(given, op.emit(relax.op.add(ours, added))))
    peepholes = None if op.input(7) is None else _row(op, op.input(7), at)
    return _Cell(op, hidden, recurrent, inner, peepholes, activations), given


def _first_state(op: Operator, index: int, at: int, x: Any, hidden: int) -> Any:
    """A state before the first step: zeros where none is given."""
    if op.input(index) is None:
        return op.constant(np.zeros((shape_of(x)[1], hidden)), dtype_of(x))
    return _row(op, op.input(index), at, axis=op.flag("layout"))


def _walked(cell: _Cell, step: Step, given: Any, states: list[Any], backwards: bool) -> tuple[list[Any], list[Any]]:
    """The hidden state of every step in the order of time, and the states after the last one taken.

    A sequence that is shorter than the longest keeps its states where it has no step, and its outputs are zero there;
    one without steps leaves zeros, as in ONNX Runtime.
    """
    op, (steps, batch, _) = cell.op, shape_of(given)
    known, lengths, rows = op.value(4), None, {}
    if op.input(4) is not None and (known is None or (known != steps).any()):
        lengths = op.emit(relax.op.reshape(op.input(4), [batch, 1]))
    for at in reversed(range(steps)) if backwards else range(steps):
        one = op.emit(relax.op.reshape(_part(op, given, 0, at, at + 1), shape_of(given)[1:]))
        following = step(cell, one, states)
        rows[at] = following[0]
        if lengths is not None:
            there = op.emit(relax.op.less(op.like(at, lengths), lengths))
            following = [op.emit(relax.op.where(there, *pair)) for pair in zip(following, states, strict=True)]
            rows[at] = op.emit(relax.op.where(there, rows[at], op.like(0, rows[at])))
        states = following
    if lengths is not None:
        some = op.emit(relax.op.greater(lengths, op.like(0, lengths)))
        states = [op.emit(relax.op.where(some, state, op.like(0, state))) for state in states]
    return [rows[at] for at in range(steps)], states


def _stacked(op: Operator, parts: list[Any], axis: int) -> Any:
    rows = [op.emit(relax.op.expand_dims(part, axis)) for part in parts]
    return rows[0] if len(rows) == 1 else op.emit(relax.op.concat(rows, axis))


def _row(op: Operator, x: Any, at: int, axis: int = 0) -> Any:
    """What ``x`` holds for direction ``at``."""
    shape = shape_of(x)
    return _folded(
        op, x, lambda array: array.take(at, axis),
        lambda: relax.op.reshape(_part(op, x, axis, at, at + 1), shape[:axis] + shape[axis + 1 :]),
    )  # fmt: skip


def _part(op: Operator, x: Any, axis: int, start: int, stop: int) -> Any:
    """``x`` from ``start`` to before ``stop`` along an axis."""
    axis %= len(shape_of(x))
    return _folded(
        op, x, lambda array: array.take(range(start, stop), axis),
        lambda: relax.op.strided_slice(x, [axis], [start], [stop]),
    )  # fmt: skip


def _transposed(op: Operator, x: Any) -> Any:
    return _folded(op, x, lambda array: np.ascontiguousarray(array.T), lambda: relax.op.permute_dims(x))


def _folded(op: Operator, x: Any, known: Callable[[np.ndarray], np.ndarray], otherwise: Callable[[], Any]) -> Any:
    """A weight rearranged now; an operator that does so where an input decides it."""
    array = op.importer.known(x)
    return op.emit(otherwise()) if array is None else op.constant(known(array))


def _activations(op: Operator, usual: list[bytes]) -> list[Activation]:
    """The layer's activations, those of the first direction first; each takes the factors it needs off the lists."""
    factors = {name: iter(op.attributes.get(f"activation_{name}", ())) for name in ("alpha", "beta")}
    return [_activation(op, name.decode(), factors) for name in op.attributes.get("activations", usual)]


def _activation(op: Operator, name: str, factors: dict[str, Iterator[float]]) -> Activation:
    emit, number = op.emit, op.like
    plain: dict[str, Activation] = {
        "relu": relax.op.nn.relu,
        "tanh": relax.op.tanh,
        "sigmoid": relax.op.sigmoid,
        "softsign": lambda x: relax.op.divide(x, emit(relax.op.add(number(1, x), emit(relax.op.abs(x))))),
        "softplus": relax.op.nn.softplus,
    }
    known = next((key for key in (*plain, *_WITH_FACTORS) if key == name.lower()), None)
    if known is None:
        raise UnsupportedError(f"is not supported with the activation {name}")
    if known in plain:
        return lambda x: emit(plain[known](x))
    usual, function = _WITH_FACTORS[known]
    given = [next(factors[kind], value) for kind, value in zip(("alpha", "beta"), usual, strict=False)]
    return lambda x: function(op, x, *given)


def _affine(op: Operator, x: Any, alpha: float, beta: float) -> Any:
    scaled = op.emit(relax.op.multiply(x, op.like(alpha, x)))
    return op.emit(relax.op.add(scaled, op.like(beta, x)))


def _scaled_tanh(op: Operator, x: Any, alpha: float, beta: float) -> Any:
    inner = op.emit(relax.op.tanh(op.emit(relax.op.multiply(x, op.like(beta, x)))))
    return op.emit(relax.op.multiply(inner, op.like(alpha, x)))


def _hard_sigmoid(op: Operator, x: Any, alpha: float, beta: float) -> Any:
    return op.emit(relax.op.clip(_affine(op, x, alpha, beta), 0.0, 1.0))


def _elu(op: Operator, x: Any, alpha: float) -> Any:
    below = op.emit(relax.op.exp(op.emit(relax.op.minimum(x, op.like(0, x)))))
    below = _affine(op, below, alpha, -alpha)
    return op.emit(relax.op.add(op.emit(relax.op.nn.relu(x)), below))


def _thresholded(op: Operator, x: Any, alpha: float) -> Any:
    above = op.emit(relax.op.greater(x, op.like(alpha, x)))
    return op.emit(relax.op.where(above, x, op.like(0, x)))


#: Activations that have factors, and their usual values.
_WITH_FACTORS: dict[str, tuple[tuple[float, ...], Callable[..., Any]]] = {
    "affine": ((1.0, 0.0), _affine),
    "elu": ((1.0,), _elu),
    "hardsigmoid": ((0.2, 0.5), _hard_sigmoid),
    "leakyrelu": ((0.01,), lambda op, x, alpha: op.emit(relax.op.nn.leakyrelu(x, alpha))),
    "scaledtanh": ((1.0, 1.0), _scaled_tanh),
    "thresholdedrelu": ((1.0,), _thresholded),
}


CONVERSIONS: dict[str, Conversion] = {
    "RNN": _recurrent(_rnn, 1, 1, ("Tanh",)),
    "GRU": _recurrent(_gru, 3, 1, ("Sigmoid", "Tanh")),
    "LSTM": _recurrent(_lstm, 4, 2, ("Sigmoid", "Tanh", "Tanh")),
}
