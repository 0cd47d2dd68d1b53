"""Replace attention, written as matrix products around a softmax, by one kernel, and other products of variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tvm
from tvm import relax

from dance_tvm.ir.graph import Graph, Shape, constant, dtype_of, is_tensor, replace_each, shape_of, substitute
from dance_tvm.ir.reasons import Reasons
from dance_tvm.ir.views import RESHAPES, View, joined, moved, regrouped, view_of
from dance_tvm.schedules.cpu.attention import Attention
from dance_tvm.schedules.cpu.product import Placed, Product, tile_for
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.emit import FLOAT
from dance_tvm.schedules.strided import Strided

from .calls import call_kernel

#: Operators between which a mask of -infinity is looked for, as scaled_dot_product_attention is exported.
MASKING = ("logical_not", "astype", "max", "any")


@tvm.transform.module_pass(opt_level=0, name="LowerAttention")
class LowerAttention:
    """``softmax(scale · q kᵀ + biases) v`` in float32 becomes a call of one kernel, which reads its operands where they
    lie and writes its result where it is wanted; other products of two variables become calls as well."""

    def __init__(self, machine: Machine, threads: int, reasons: Reasons) -> None:
        self.machine, self.threads, self.reasons = machine, threads, reasons

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``main``."""
        graph = Graph.of(mod["main"])

        def make(
            builder: relax.BlockBuilder, _var: relax.Var, call: _Call, new: dict[relax.Var, relax.Expr]
        ) -> relax.Expr:
            operands = {name: substitute(read, new) for name, read in call.operands.items()}
            return call_kernel(builder, call.kernel, operands, self.threads)

        return replace_each(mod, _calls(graph, self.machine, self.threads, self.reasons), make)


@dataclass(frozen=True)
class _Call:
    """A kernel in the place of ``end`` and all that it is made of alone, and what it reads."""

    end: relax.Var
    kernel: Attention | Product
    operands: dict[str, relax.Expr]
    #: Another product that the kernel computes.
    inside: relax.Var | None = None


def _calls(graph: Graph, machine: Machine, threads: int, reasons: Reasons) -> dict[relax.Var, _Call]:
    """The kernels of ``main``, by what they replace."""
    products = []
    for var in graph.order:
        if graph.op(var) == "matmul":
            if is_tensor(var) and dtype_of(var) == FLOAT and 0 not in shape_of(var):
                products.append(var)
            else:
                reasons.add(var, "TVM's own product: it is not float32, or empty")
    whole: dict[relax.Var, _Call] = {}
    for var in products:
        attention = _attention(graph, var, machine, threads)
        if isinstance(attention, _Call):
            whole[var] = attention
        elif attention:
            reasons.add(var, f"attention in parts: {attention}")
    inside = {call.inside for call in whole.values()}
    found = {call.end: call for call in whole.values()}
    for var in products:
        if var not in whole and var not in inside:
            product = _product(graph, var, machine, threads)
            if isinstance(product, _Call):
                found[product.end] = product
            else:
                reasons.add(var, f"TVM's own product: {product}")
    return found


# --- matrices in tensors ---


def _matrices(graph: Graph, expr: relax.Expr, batch: Shape, columns: bool = False) -> tuple[View, Strided] | None:
    """Where the matrices of ``expr``, its last two axes, lie: one for each of ``batch``, as products broadcast.
    ``columns``: they must lie side by side. None where no constant distances lead to them."""
    for view in (view_of(graph, expr, scaled=True), View.whole(expr)):
        shape = view.shape
        if len(shape) < 2 or not is_tensor(view.source) or dtype_of(view.source) != FLOAT:
            continue
        wide = view.broadcast([*batch, *shape[-2:]])
        if (found := _strided(wide, columns and shape[-1] > 1)) is not None:
            return wide, replace(found, columns=1) if columns else found
    return None


def _strided(view: View, side_by_side: bool) -> Strided | None:
    """Where the matrices of a view lie, its last two axes; None where no constant distances lead to them or, if
    ``side_by_side``, columns lie apart."""
    row, column = (view.one_digit(axis) for axis in (len(view.axes) - 2, len(view.axes) - 1))
    if row is None or column is None or (side_by_side and column[1] != 1):
        return None
    outer = tuple(joined([digit for axis in view.axes[:-2] for digit in axis]))
    return Strided(outer, row[1], column[1], view.base)


def _batch(*shapes: Shape) -> Shape:
    """The axes before the last two of a product."""
    return tuple(np.broadcast_shapes(*(shape[:-2] for shape in shapes)))


def _target(graph: Graph, var: relax.Var, rows: Shape) -> tuple[relax.Var, Strided]:
    """The last binding that only moves what ``var`` computes and keeps its columns together, and where the matrices of
    ``rows`` (how many, rows, columns) lie in it. Nobody else reads those before."""
    view, end = View.whole(var), var
    found = end, _placed(view, rows)
    while (reader := graph.only_reader(end)) is not None and is_tensor(reader):
        following = moved(graph, reader, view)
        if following is None:
            break
        view, end = following, reader
        if (placed := _placed(view, rows)) is not None:
            found = end, placed
    end, at = found
    assert at is not None
    return end, at


def _placed(view: View, rows: Shape) -> Strided | None:
    """Where the matrices that lie one behind the other in the source of ``view`` lie in what it makes of them."""
    digits = [digit for axis in view.axes for digit in axis if digit[0] > 1]
    if view.base or math.prod(extent for extent, _ in digits) != math.prod(rows):
        return None
    behind = [math.prod(extent for extent, _ in digits[at + 1 :]) for at in range(len(digits))]
    order = sorted(range(len(digits)), key=lambda at: -digits[at][1])
    distances = [digits[at][1] for at in order]
    if distances != [math.prod(digits[at][0] for at in order[place + 1 :]) for place in range(len(order))]:
        return None
    axes = regrouped([(digits[at][0], behind[at]) for at in order], rows)
    if axes is None:
        return None
    outer, row, column = (joined(axis) for axis in axes)
    if len(row) > 1 or len(column) > 1 or (column and column[0][1] != 1):
        return None
    return Strided(tuple(outer), row[0][1] if row else 0, 1)


# --- attention ---


@dataclass(frozen=True)
class _Scores:
    """A product of queries with keys, and what is added to it: each bias with the shape that it is added under."""

    product: relax.Var
    scale: float = 1.0
    biases: tuple[tuple[relax.Expr, Shape], ...] = field(default=())


def _attention(graph: Graph, var: relax.Var, machine: Machine, threads: int) -> _Call | str:
    """The kernel of the attention whose last product is ``var``; or why there is none, empty for no softmax."""
    weights, values = graph.call(var).args
    softmax, safe = _softmax(graph, weights)
    if softmax is None:
        return ""
    scores = _scores(graph, graph.call(softmax).args[0])
    if scores is None:
        return "its scores are no scaled product of two variables with biases"
    product = graph.call(scores.product)
    queries, keys, width = shape_of(scores.product)[-2], shape_of(scores.product)[-1], shape_of(var)[-1]
    batch, heads = _batch(shape_of(weights), shape_of(values)), math.prod(shape_of(var)[:-2])
    inner = _batch(shape_of(product.args[0]), shape_of(product.args[1]))
    q, k = _matrices(graph, product.args[0], inner, columns=True), _matrices(graph, product.args[1], inner)
    v = _matrices(graph, values, batch)
    biases = [_bias(graph, bias, shape) for bias, shape in scores.biases]
    if q is None or k is None or v is None or any(bias is None for bias in biases):
        return "queries, keys, values or biases lie at no constant distances"
    if math.prod(inner) != heads or math.prod(batch) != heads or v[0].scale != 1.0:
        return "heads share queries or keys, or values are scaled"
    end, at = _target(graph, var, (heads, queries, width))
    read = {"q": q, "k": k, "v": v} | {f"bias_{index}": bias for index, bias in enumerate(biases) if bias}
    placed = {name: Placed(shape_of(view.source), where) for name, (view, where) in read.items()}
    depth = shape_of(product.args[0])[-1]
    kernel = Attention(
        *(heads, queries, keys, depth, width),
        placed["q"],
        placed["k"],
        placed["v"],
        Placed(shape_of(end), at),
        tile_for(machine, heads, queries, threads),
        scores.scale * q[0].scale * k[0].scale,
        tuple(placed[f"bias_{index}"] for index in range(len(biases))),
        safe,
    )
    return _Call(end, kernel, {name: view.source for name, (view, _) in read.items()}, scores.product)


def _same_rows(graph: Graph, expr: relax.Expr) -> relax.Expr:
    """What ``expr`` is under other axes before the last two."""
    while graph.op(expr) in (*RESHAPES, "broadcast_to"):
        inner = graph.call(expr).args[0]
        whole = math.prod(shape_of(inner)) == math.prod(shape_of(expr))
        if not whole or shape_of(inner)[-2:] != shape_of(expr)[-2:]:
            break
        expr = inner
    return expr


def _softmax(graph: Graph, weights: relax.Expr) -> tuple[relax.Var | None, bool]:
    """The softmax over the last axis that ``weights`` are, and whether rows of -infinity become zeros behind it."""
    inner, safe = _same_rows(graph, weights), False
    if graph.op(inner) == "where":
        condition, zeros, inner = graph.call(inner).args
        value = constant(zeros)
        if value is None or value.any() or graph.op(inner) != "nn.softmax":
            return None, False
        if not _all_hidden(graph, condition, graph.call(inner).args[0]):
            return None, False
        safe = True
    if graph.op(inner) != "nn.softmax" or graph.only_reader(inner) is None:
        return None, False
    rank = len(shape_of(inner))
    return (inner, safe) if int(graph.call(inner).attrs.axis) % rank == rank - 1 else (None, False)


def _all_hidden(graph: Graph, condition: relax.Expr, scores: relax.Expr) -> bool:
    """Whether ``condition`` is true where all scores of a row are -infinity."""
    turned, reduced = 0, False
    while graph.op(condition) in MASKING:
        turned += graph.op(condition) == "logical_not"
        reduced |= graph.op(condition) in ("max", "any")
        condition = graph.call(condition).args[0]
    if graph.op(condition) != "equal" or turned != 2 or not reduced:
        return False
    left, right = graph.call(condition).args
    value = constant(right)
    return left.same_as(scores) and value is not None and value.size == 1 and float(value.reshape(())) == -math.inf


def _scores(graph: Graph, expr: relax.Expr) -> _Scores | None:
    """``expr`` as a scaled product with biases; None where it is anything else."""
    expr = _same_rows(graph, expr)
    name = graph.op(expr)
    if name == "matmul":
        ours = all(constant(arg) is None and len(shape_of(arg)) >= 2 for arg in graph.call(expr).args)
        return _Scores(expr) if ours and dtype_of(expr) == FLOAT else None
    if name not in ("add", "multiply", "divide"):
        return None
    left, right = graph.call(expr).args
    for inner, other in ((left, right), (right, left)) if name != "divide" else ((left, right),):
        if not isinstance(inner, relax.Var) or shape_of(inner) != shape_of(expr):
            continue
        found = _scores(graph, inner)
        if found is None or found.product.same_as(other):
            continue
        if name == "add":
            return replace(found, biases=(*found.biases, (other, shape_of(expr))))
        value = constant(other)
        if value is not None and value.size == 1 and not found.biases:
            factor = float(value.reshape(()))
            return replace(found, scale=found.scale * (1 / factor if name == "divide" else factor))
    return None


def _bias(graph: Graph, bias: relax.Expr, shape: Sequence[int]) -> tuple[View, Strided] | None:
    """Where a bias lies for each row of scores of ``shape``, its columns side by side."""
    if dtype_of(bias) != FLOAT or shape_of(bias)[-1:] != tuple(shape[-1:]):
        return None
    for view in (view_of(graph, bias), View.whole(bias)):
        wide = view.broadcast(shape)
        if (found := _strided(wide, True)) is not None:
            return wide, found
    return None


# --- other products ---


def _product(graph: Graph, var: relax.Var, machine: Machine, threads: int) -> _Call | str:
    """The kernel of a product of two variables; or why there is none."""
    left, right = graph.call(var).args
    if min(len(shape_of(left)), len(shape_of(right))) < 2 or dtype_of(left) != FLOAT or dtype_of(right) != FLOAT:
        return "one of its operands is a vector, or not float32"
    batch = _batch(shape_of(left), shape_of(right))
    a, b = _matrices(graph, left, batch, columns=True), _matrices(graph, right, batch)
    if a is None or b is None:
        return "its operands lie at no constant distances"
    rows, terms, columns = shape_of(left)[-2], shape_of(left)[-1], shape_of(right)[-1]
    end, at = _target(graph, var, (math.prod(batch), rows, columns))
    kernel = Product(
        *(math.prod(batch), rows, terms, columns),
        Placed(shape_of(a[0].source), a[1]),
        Placed(shape_of(b[0].source), b[1]),
        Placed(shape_of(end), at),
        tile_for(machine, math.prod(batch), rows, threads),
        a[0].scale * b[0].scale,
    )
    return _Call(end, kernel, {"a": a[0].source, "b": b[0].source})
