"""Liveness of a torch.fx graph that calls modules, and what its masks' values leave of it.

The same analysis and the same rules as for Relax: only names and layouts are translated. Masks are expressions until
``evaluate`` is given their values, as tensors with gradients where training wants them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from dance_tvm.schedules.geometry import Triple, Window, triple

from .analysis import Key
from .expressions import Both, Either, Expression, Factor, Grown, Joined, Part, Shape, nodes
from .rules import MOST_FACTORS, Operation

MODULES: dict[type[nn.Module], str] = {
    nn.Conv2d: "nn.conv2d",
    nn.Conv3d: "nn.conv3d",
    nn.MaxPool2d: "nn.max_pool2d",
    nn.MaxPool3d: "nn.max_pool3d",
    nn.AvgPool2d: "nn.avg_pool2d",
    nn.AvgPool3d: "nn.avg_pool3d",
    nn.BatchNorm1d: "nn.batch_norm",
    nn.BatchNorm2d: "nn.batch_norm",
    nn.BatchNorm3d: "nn.batch_norm",
    nn.ReLU: "nn.relu",
    nn.ReLU6: "nn.relu6",
    nn.LeakyReLU: "nn.leakyrelu",
    nn.SiLU: "nn.silu",
    nn.GELU: "nn.gelu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Dropout: "nn.dropout",
    nn.Dropout3d: "nn.dropout",
    nn.Identity: "nn.dropout",
}
#: Functions and methods, by the function's name.
FUNCTIONS: dict[str, str] = {
    **dict.fromkeys(("relu", "relu_"), "nn.relu"),
    **dict.fromkeys(("add", "iadd"), "add"),
    **dict.fromkeys(("sub", "isub"), "subtract"),
    **dict.fromkeys(("mul", "imul"), "multiply"),
    **dict.fromkeys(("cat", "concat"), "concat"),
    **{"sigmoid": "sigmoid", "tanh": "tanh", "silu": "nn.silu", "dropout": "nn.dropout"},
    **{"maximum": "maximum", "minimum": "minimum", "abs": "abs", "square": "square", "pow": "power"},
    **{name: f"nn.{name}" for name in ("max_pool2d", "max_pool3d", "avg_pool2d", "avg_pool3d")},
}
#: Exponents of powers that the compiler makes products of.
_PRODUCTS = range(2, MOST_FACTORS + 1)


class ModuleView:
    """A ``fx.GraphModule`` with shapes (``tensor_meta``) as the analysis sees it.

    Keys are its nodes. A convolution with a bias is two operations, as it is in Relax: (node, "sum") is the key of its
    products' sum. A subclass may translate modules of its own.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.modules = dict(graph.named_modules())
        self.params: list[Key] = []
        self.order: list[Key] = []
        self.outputs: set[Key] = set()
        self.readers: dict[Key, list[Key]] = {}
        self.operations: dict[Key, Operation | None] = {}
        self.shapes: dict[Key, Shape] = {}
        for node in graph.graph.nodes:
            self._enter(node)

    def operation(self, key: Key) -> Operation | None:
        """The operation whose result ``key`` is."""
        return self.operations.get(key)

    def shape(self, key: Key) -> Shape | None:
        """Shape with channels innermost."""
        return self.shapes.get(key)

    def dtype(self, key: Key) -> str:
        """Masks are booleans; all else is taken for float32, as training's mixed precision changes no count."""
        return "float32"

    def constant(self, key: Key) -> NDArray[Any] | None:
        """Parameters are no constants while they are trained."""
        return None

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    # -- entering nodes ------------------------------------------------------------------------------------------------

    def _enter(self, node: fx.Node) -> None:
        if node.op == "output":
            self.outputs |= set(node.all_input_nodes)
        elif node.op in ("placeholder", "get_attr"):
            self.params.append(node)
            self.readers[node] = []
            self._note_shape(node, node)
        else:
            self.translate(node)

    def translate(self, node: fx.Node) -> None:
        """Adds the operations that ``node`` stands for."""
        module, name = self.module(node), operator_of(node, self.modules)
        if not name:
            self.add(node, None, tuple(node.all_input_nodes), node)
        elif name == "power":
            self._translate_power(node)
        elif name in ("nn.conv2d", "nn.conv3d") and module is not None and module.bias is not None:
            self.add((node, "sum"), name, tuple(node.all_input_nodes), node, window_of(node, module))
            self.add(node, "add", ((node, "sum"), (node, "bias")), node)
        else:
            module = _pool(node) if module is None and "pool" in name else module
            window = window_of(node, module) if module is not None and ("pool" in name or "conv" in name) else None
            axis = _last_axis(node) if name == "concat" else None
            self.add(node, name, _operands(node), node, window, {} if axis is None else {"axis": axis})

    def _translate_power(self, node: fx.Node) -> None:
        """Whole powers as the products that the compiler makes of them; of others nothing is known."""
        base, exponent = (*node.args, *node.kwargs.values())[:2]
        if not isinstance(base, fx.Node) or not isinstance(exponent, int | float) or exponent not in _PRODUCTS:
            self.add(node, None, tuple(node.all_input_nodes), node)
            return
        product: Key = base
        for factor in range(2, int(exponent) + 1):
            result = node if factor == exponent else (node, factor)
            self.add(result, "multiply", (product, base), node)
            product = result

    def add(
        self,
        key: Key,
        name: str | None,
        operands: tuple[Key, ...],
        like: fx.Node,
        window: Window | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        """One operation with a result shaped like that of ``like``; ``name`` None where nothing is known of it."""
        self.order.append(key)
        self.readers[key] = []
        self._note_shape(key, like)
        for operand in dict.fromkeys(operands):
            if operand in self.readers:
                self.readers[operand].append(key)
        shapes = tuple(self.shapes.get(operand) for operand in operands)
        if name is not None and key in self.shapes:
            constants: tuple[None, ...] = (None,) * len(operands)
            self.operations[key] = Operation(
                name, operands, self.shapes[key], shapes, constants, window=window, numbers=numbers or {}
            )

    def _note_shape(self, key: Key, node: fx.Node) -> None:
        meta = getattr(node.meta.get("tensor_meta"), "shape", None)
        if meta is not None:
            n, *rest = meta
            self.shapes[key] = (n, *rest[1:], rest[0]) if len(rest) > 1 else (n, *rest)


def operator_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Relax's name of the operator that ``node`` calls; empty where the table of rules has none."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return "" if module is None else MODULES.get(type(module), "")
    return FUNCTIONS.get(_called(node), "")


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)) if node.op in ("call_function", "call_method") else ""


def _operands(node: fx.Node) -> tuple[Key, ...]:
    """Its tensors in order, repeated where an operator takes one twice; numbers are keys that nothing is known of."""
    flat: list[Any] = []
    for arg in node.args:
        flat += list(arg) if isinstance(arg, list | tuple) else [arg]
    operands = [arg if isinstance(arg, fx.Node) else (node, place) for place, arg in enumerate(flat)]
    binary = _called(node) in ("add", "iadd", "sub", "isub", "mul", "imul", "maximum", "minimum")
    return tuple(operands[:2]) if binary else tuple(arg for arg in operands if isinstance(arg, fx.Node))


#: The arguments of pools as functions, behind the input.
_POOLS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "max_pool2d": (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    "max_pool3d": (nn.MaxPool3d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    "avg_pool2d": (nn.AvgPool2d, ("kernel_size", "stride", "padding", "ceil_mode")),
    "avg_pool3d": (nn.AvgPool3d, ("kernel_size", "stride", "padding", "ceil_mode")),
}


def _pool(node: fx.Node) -> nn.Module | None:
    """The module that does what the function that ``node`` calls does; None where its window is computed."""
    if len(node.all_input_nodes) > 1:
        return None
    kind, names = _POOLS[_called(node)]
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    return kind(**{name: given[name] for name in names if name in given})


def _last_axis(node: fx.Node) -> int:
    """Where the axis of a concatenation is with channels innermost."""
    rank = len(node.meta["tensor_meta"].shape)
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return [0, *range(2, rank), 1].index(operator.index(dim) % rank)


def window_of(node: fx.Node, module: nn.Module) -> Window | None:
    """The window of a convolution or pool that ``node`` calls; None where its data has no known shape."""
    source = getattr(node.all_input_nodes[0].meta.get("tensor_meta"), "shape", None)
    result = getattr(node.meta.get("tensor_meta"), "shape", None)
    if source is None or result is None or len(source) not in (4, 5):
        return None
    return module_window(module, source, result)


def module_window(module: Any, source: Sequence[int], result: Sequence[int]) -> Window:
    """The window of a convolution or pool, or of what has its sizes, between shapes (N, C, ...); those over one or two
    axes get extent 1 before theirs."""
    rank = len(source) - 2
    dilation, kernel = _each(getattr(module, "dilation", 1), rank), _each(module.kernel_size, rank)
    padding: Any = module.padding
    if isinstance(padding, str):
        padding = [d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    return Window(
        source[0],
        _three(source[2:], 1),
        _three(result[2:], 1),
        _three(kernel, 1),
        _three(_each(module.stride, rank), 1),
        _three(_each(padding, rank), 0),
        _three(dilation, 1),
    )


def _each(value: Any, rank: int) -> list[int]:
    return [value] * rank if isinstance(value, int) else list(value)


def _three(values: Any, fill: int) -> Triple:
    return triple([fill] * (3 - len(values)) + [int(value) for value in values])


# -- values of masks ---------------------------------------------------------------------------------------------------


def evaluate(expression: Expression, value: Callable[[Factor], Tensor], known: dict[Expression, Tensor]) -> Tensor:
    """The mask (N, T, H, W, C) that ``expression`` is where the masks of the network are ``value`` of them.

    ``known`` keeps what has been evaluated of these masks. Where two masks meet, the product is their intersection and
    the larger their union, so that gradients pass.
    """
    for node in nodes(expression, lambda node: node not in known):
        if node not in known:
            known[node] = _value(node, value, known)
    return known[expression]


def _value(node: Expression, value: Callable[[Factor], Tensor], known: dict[Expression, Tensor]) -> Tensor:
    if isinstance(node, Factor):
        return value(node)
    if isinstance(node, Both):
        return known[node.left] * known[node.right]
    if isinstance(node, Either):
        return torch.maximum(*torch.broadcast_tensors(known[node.left], known[node.right]))
    if isinstance(node, Part):
        return known[node.inner][..., node.begin : node.end]
    if isinstance(node, Joined):
        given = next(known[mask] for mask, _ in node.parts if mask is not None)
        parts = [given.new_ones(1, 1, 1, 1, count) if mask is None else known[mask] for mask, count in node.parts]
        extents = [max(part.shape[dim] for part in parts) for dim in range(4)]
        return torch.cat([part.expand(*extents, part.shape[4]) for part in parts], 4)
    assert isinstance(node, Grown)
    return (_reached if node.forward else _seen)(known[node.inner], node)


def _spans(node: Grown) -> list[int]:
    """Axes of T, H, W along which the mask varies: the others stay of extent 1."""
    source = node.window.size if node.forward else node.window.out
    return [axis for axis in range(3) if node.inner.shape[axis + 1] != 1 or source[axis] == 1]


def _reached(mask: Tensor, node: Grown) -> Tensor:
    """Outputs whose window holds something alive."""
    window, sizes, pads = node.window, [1, 1, 1], [[0, 0], [0, 0], [0, 0]]
    strides, dilations = [1, 1, 1], [1, 1, 1]
    for axis in _spans(node):
        sizes[axis], strides[axis], dilations[axis] = window.kernel[axis], window.stride[axis], window.dilation[axis]
        covered = (window.out[axis] - 1) * strides[axis] + (sizes[axis] - 1) * dilations[axis] + 1
        pads[axis] = [window.padding[axis], covered - window.padding[axis] - mask.shape[axis + 1]]
    flat = mask.movedim(4, 1)
    padded = functional.pad(flat, [pad for axis in reversed(pads) for pad in axis])
    return functional.max_pool3d(padded, sizes, strides, 0, dilations).movedim(1, 4)


def _seen(mask: Tensor, node: Grown) -> Tensor:
    """Inputs that the window of a read output covers; one that several cover takes the largest."""
    window = node.window
    for axis in _spans(node):
        dim, stride, size = axis + 1, window.stride[axis], window.size[axis]
        length = (mask.shape[dim] - 1) * stride + 1
        reach = (window.kernel[axis] - 1) * window.dilation[axis]
        room = max(size + 2 * window.padding[axis], length + reach)
        shape = [*mask.shape[:dim], room, *mask.shape[dim + 1 :]]
        covered = mask.new_zeros(shape)
        for tap in range(window.kernel[axis]):
            start = tap * window.dilation[axis]
            places = torch.arange(start, start + length, stride, device=mask.device)
            covered = torch.maximum(covered, mask.new_zeros(shape).index_copy(dim, places, mask))
        mask = covered.narrow(dim, window.padding[axis], size)
    return mask
