"""torch.export programs to Relax: TVM's importer, with layer names, one-sentence errors, and conversions it lacks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import tvm
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.interface import TensorSpec, array_of
from dance_tvm.frontend.names import NamingBuilder
from dance_tvm.frontend.torch_conversions import CONVERSIONS
from dance_tvm.frontend.torch_graph import cast_operands, compute_in_float32, fold_constants
from dance_tvm.frontend.torch_resampling import RESAMPLING
from dance_tvm.frontend.torch_values import constant

# What core ATen takes apart and a conversion of ours does better.
_KEPT = {"select_scatter.default", "diagonal_scatter.default", "take.default", *RESAMPLING}

_UNKNOWN = "the operator {} of layer {!r} is not supported"
_BRANCHES = (
    "layer {!r} is control flow that follows a tensor's values ({}): compute both sides and choose with torch.where, "
    "or a fixed number of rounds"
)
_STATE = (
    "the network keeps state: its forward changes the buffer {!r}; export it with the state as an "
    "input and the next state as an output, as docs/dstep.md does for streams"
)

# Each round of decompositions may bring up operators that want one themselves.
_ROUNDS = 4

# Conversions of TVM's that are none: random numbers drawn once and for all, norms of some orders.
_UNTRUSTED = ("randn", "rand", "exponential", "bernoulli", "linalg_vector_norm")
_MAIN_ATEN = ("convolution", "mm", "norm", "pool", "matmul", "linear", "softmax", "upsample")


@dataclass(frozen=True)
class Decomposed:
    """A program in core ATen operators that computes in float32; ``declared`` are the types that this replaced.

    ``constants`` are the values of nodes that depend on no input.
    """

    program: torch.export.ExportedProgram
    declared: set[torch.dtype]
    constants: dict[str, torch.Tensor]


def import_program(
    decomposed: Decomposed, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[tvm.IRModule, dict[str, fx.Node]]:
    """The program as a Relax module, and for each of its variables' names the node of ``program`` it holds.

    ``inputs`` and ``outputs`` give the types that the module takes and gives. Raises DanceError that names the
    operator and the layer where a conversion is missing.
    """
    importer = _Importer(decomposed)
    mod = importer.module(inputs, outputs)
    mod = relax.transform.DeadCodeElimination()(relax.transform.CanonicalizeBindings()(mod))
    return mod, {var.name: node for node, var in importer.env.items() if isinstance(var, relax.Var)}


def decompose(program: torch.export.ExportedProgram) -> Decomposed:
    """``program`` in core ATen operators. Raises DanceError where it keeps state or cannot be decomposed."""
    if any(spec.kind is InputKind.CUSTOM_OBJ for spec in program.graph_signature.input_specs):
        raise DanceError("the network holds custom objects, which cannot be compiled: export it without them")
    table = torch.export.default_decompositions()
    _require_no_obstacle(program, table)
    try:
        for target in [target for target in table if _name_of(target) in _KEPT]:
            del table[target]
        program = program.run_decompositions(table)
        # What neither TVM nor we convert often has a decomposition that core ATen leaves alone.
        for _ in range(_ROUNDS):
            further = _further_decompositions(program)
            if not further:
                break
            program = program.run_decompositions(further)
    except Exception as problem:
        raise DanceError(_not_decomposed(problem)) from problem
    _require_stateless(program)
    # Run-time assertions have no result and would keep the whole function from being a dataflow graph.
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and not node.users:
            program.graph.erase_node(node)
    declared = compute_in_float32(program)
    cast_operands(program)
    return Decomposed(program, declared, fold_constants(program))


def _require_no_obstacle(program: torch.export.ExportedProgram, table: Mapping[Any, Any]) -> None:
    """Raise DanceError for what taking the program apart, some seconds for a large one, would only show later."""
    from torch._decomp import decomposition_table

    specs = program.graph_signature.input_specs
    buffers = {spec.arg.name: spec.target for spec in specs if spec.kind is InputKind.BUFFER}
    given = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
    decided: set[fx.Node] = set()  # what depends on an input
    for node in program.graph.nodes:
        if node.name in given or not decided.isdisjoint(node.all_input_nodes):
            decided.add(node)
        if node.op == "call_function" and str(node.target) in ("cond", "while_loop"):
            raise DanceError(_BRANCHES.format(describe(node), node.target))
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        first = node.args[0] if node.args else None
        if node.target._schema.is_mutable:
            if (
                isinstance(first, fx.Node)
                and first.name in buffers
                and _name_of(node.target).partition(".")[0][-1] == "_"
            ):
                raise DanceError(_STATE.format(buffers[first.name]))
        elif node in decided and node.users and (tensors := _tensors_of(node)):
            if any(tensor.is_complex() for tensor in tensors):
                problem = f"the operator {node.target} of layer {describe(node)!r} makes complex numbers"
                raise DanceError(f"{problem}, which is not supported: compute with real ones")
            apart = node.target in table or node.target in decomposition_table or _is_composite(node.target)
            if not apart and not _is_known(node):
                raise DanceError(_UNKNOWN.format(node.target, describe(node)))


def _tensors_of(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [part for part in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(part, torch.Tensor)]


def _is_composite(target: torch._ops.OpOverload) -> bool:
    """Whether PyTorch itself computes the operator by others, so that no program in core operators holds it."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key in target.py_kernels or target.has_kernel_for_dispatch_key(key)


def _not_decomposed(problem: Exception) -> str:
    """What to say where PyTorch fails to take a program apart; its own words run over many lines and name no layer."""
    found = re.search(r"target=torch\.ops\.([\w.]+)", str(problem))
    operator = f"the operator {found[1]}" if found else "an operator"
    if isinstance(problem, GuardOnDataDependentSymNode):
        return f"a size that depends on the input's values reaches {operator}: export the network with fixed sizes"
    return f"PyTorch cannot take {operator} of the exported program apart: export the network without it"


def _further_decompositions(program: torch.export.ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """PyTorch's own decompositions of the operators in ``program`` that nothing here converts."""
    from torch._decomp import decomposition_table

    unknown = {node.target for node in program.graph.nodes if node.op == "call_function" and not _is_known(node)}
    return {target: decomposition_table[target] for target in unknown if target in decomposition_table}


def _require_stateless(program: torch.export.ExportedProgram) -> None:
    changed = [s.target for s in program.graph_signature.output_specs if s.kind is OutputKind.BUFFER_MUTATION]
    if changed:
        raise DanceError(_STATE.format(changed[0]))


def require_inference(program: torch.export.ExportedProgram) -> None:
    """Raise DanceError, naming the layer, where ``program`` was exported in training mode and that changes it."""
    for graph in (program.graph_module, *program.graph_module.modules()):
        if not isinstance(graph, fx.GraphModule):
            continue
        for node in graph.graph.nodes:
            if node.op == "call_function" and _is_training(node):
                raise DanceError(
                    f"the layer {describe(node)!r} ({_operator(node)}) is in training mode: call .eval() on the "
                    "network and export it again"
                )


def _is_training(node: fx.Node) -> bool:
    """Whether the operator does something else in training, and does it here."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    operator = _operator(node)
    if operator.startswith("scaled_dot_product"):
        return given.get("dropout_p", 0) != 0
    if operator.endswith("dropout"):
        return given.get("train") is not False and given.get("p", 0.5) != 0
    if operator == "instance_norm":
        return given.get("use_input_stats") is True and given.get("running_mean") is not None
    if operator.endswith("batch_norm") or "batch_norm_legit" in operator:
        return given.get("training") is True and given.get("running_mean") is not None
    return operator.startswith("rrelu") and given.get("training") is True


def layer_of(node: fx.Node) -> tuple[str, bool]:
    """The dotted name of the module that ``node`` came from ('' is the network itself), and whether it is a leaf."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", False
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return _plain_path(path), kind.startswith("torch.nn.modules.") and "container" not in kind


def _plain_path(path: str) -> str:
    """``L['self'].a.b`` and ``a.b@1`` (a second call) as ``a.b``."""
    return path.removeprefix("L['self']").strip(".").split("@")[0]


def describe(node: fx.Node) -> str:
    """How an error names ``node``: its layer, or its own name where no layer is known."""
    layer, _ = layer_of(node)
    return layer or node.name


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message, which has many lines in PyTorch and TVM."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0] if lines else type(problem).__name__


def _is_known(node: fx.Node) -> bool:
    name = _name_of(node.target)
    return name in CONVERSIONS or (name in _known_to_tvm() and not name.startswith(_UNTRUSTED))


@functools.cache
def _known_to_tvm() -> frozenset[str]:
    return frozenset(ExportedProgramImporter().convert_map)


class _Importer(ExportedProgramImporter):
    """TVM's importer, which names what it emits after the layer of each node."""

    env: dict[fx.Node, Any]

    def __init__(self, decomposed: Decomposed) -> None:
        super().__init__()
        self.block_builder = NamingBuilder()
        self._program, self._constants = decomposed.program, decomposed.constants

    def parameter(self, node: Any) -> torch.Tensor | None:
        """The value of a weight, buffer, constant or what is computed of these; None for what an input decides."""
        return self._constants.get(node.name)

    def module(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> tvm.IRModule:
        """The program's graph as a module whose ``main`` takes and gives tensors of the declared types."""
        nodes = list(self._program.graph.nodes)
        self._require_known(nodes)
        params = {spec.name: relax.Var(spec.name, relax.TensorType(spec.shape, spec.dtype)) for spec in inputs}
        with self.block_builder.function("main", params=list(params.values())):
            with self.block_builder.dataflow():
                results = self.block_builder.emit_output(relax.Tuple(self._translate(nodes, params, outputs)))
            self.block_builder.emit_func_output(results)
        return self.block_builder.get()

    def _require_known(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            if node.op == "call_function" and node.name not in self._constants and not _is_known(node):
                raise DanceError(_UNKNOWN.format(node.target, describe(node)))

    def _translate(
        self, nodes: list[fx.Node], params: Mapping[str, relax.Var], outputs: Sequence[TensorSpec]
    ) -> list[relax.Expr]:
        names = _names(nodes)
        for node in nodes:
            if (value := self._constants.get(node.name)) is not None:
                self.env[node] = constant(array_of(value)) if node.users else None
            elif node.op == "placeholder":
                self.env[node] = self._input(node, params)
            elif node.op == "output":
                return self._results(node, outputs)
            else:
                self.env[node] = self._convert(node, names[node])
        raise DanceError("the exported program returns nothing")

    def _input(self, node: fx.Node, params: Mapping[str, relax.Var]) -> relax.Expr | None:
        if node.name not in params:
            return None  # fixed when the network was exported
        self.block_builder.enter(node.name, only=False)
        return self._in_type(params[node.name], self._convert_data_type(node.meta["val"].dtype))

    def _results(self, node: fx.Node, outputs: Sequence[TensorSpec]) -> list[relax.Expr]:
        """What the user gets, in the types that the network declares: no next states, no None."""
        kinds = [spec.kind for spec in self._program.graph_signature.output_specs]
        given = zip(self.retrieve_args(node)[0], kinds, strict=True)
        tensors = [value for value, kind in given if kind is OutputKind.USER_OUTPUT and value is not None]
        self.block_builder.enter("output", only=False)
        return [
            self._in_type(value if isinstance(value, relax.Expr) else constant(array_of(value)), spec.dtype)
            for value, spec in zip(tensors, outputs, strict=True)
        ]

    def _in_type(self, value: relax.Expr, dtype: str) -> relax.Expr:
        same = str(value.ty.dtype.dtype) == dtype
        return value if same else self.block_builder.emit(relax.op.astype(value, dtype))

    def _convert(self, node: fx.Node, name: tuple[str, bool]) -> Any:
        operator = _name_of(node.target)
        self.block_builder.enter(name[0], only=name[1])
        try:
            ours = CONVERSIONS.get(operator)
            value = ours(node, self) if ours else self.convert_map[operator](node)
        except DanceError as problem:
            raise DanceError(f"the operator {node.target} of layer {describe(node)!r}: {problem}") from None
        except Exception as problem:
            raise DanceError(
                f"the operator {node.target} of layer {describe(node)!r} is not supported in this form: "
                f"{first_line(problem)}"
            ) from problem
        if isinstance(value, relax.Expr) and not isinstance(value, relax.Var):
            value = self.block_builder.emit(value)
        return self._agree(node, value)

    def _agree(self, node: fx.Node, value: Any) -> Any:
        """``value`` with the dtype that PyTorch gives ``node``; raises DanceError for a different shape."""
        expected = node.meta.get("val")
        if not (isinstance(expected, torch.Tensor) and isinstance(value, relax.Expr)):
            return value
        if not isinstance(value.ty, relax.TensorType):
            return value
        if not all(isinstance(extent, tvm.tirx.IntImm) for extent in value.ty.shape):
            raise DanceError(
                f"the operator {node.target} of layer {describe(node)!r} has a result whose size depends on the "
                "input's values: export the network with fixed sizes"
            )
        shape = tuple(int(extent) for extent in value.ty.shape)
        known = all(isinstance(extent, int) for extent in expected.shape)
        if known and shape != tuple(expected.shape):
            raise DanceError(
                f"the operator {node.target} of layer {describe(node)!r} is not supported in this form: "
                f"it would be imported with shape {shape} in place of {tuple(expected.shape)}"
            )
        return self._in_type(value, self._convert_data_type(expected.dtype))


def _names(nodes: list[fx.Node]) -> dict[fx.Node, tuple[str, bool]]:
    """For each node the name of what it emits, and whether its first emission is the layer itself.

    In a leaf module (a convolution, a ReLU) that is the module's name; elsewhere the enclosing module's name and the
    operator's (``layer1.0.add``).
    """
    names = {}
    calls = [node for node in nodes if node.op == "call_function"]
    for (layer, leaf), run in groupby(calls, key=layer_of):
        group = list(run)
        if not leaf:
            names.update({node: (f"{layer}.{_operator(node)}".strip("."), True) for node in group})
            continue
        has_main = any(part in str(node.target) for node in group for part in _MAIN_ATEN)
        names.update({node: (layer, node is group[-1] and not has_main) for node in group})
    return names


def _operator(node: fx.Node) -> str:
    """``add`` for ``aten.add.Tensor``."""
    return _name_of(node.target).partition(".")[0].strip("_")


def _name_of(target: Any) -> str:
    return str(getattr(target, "__name__", target))
