"""torch.export programs to Relax: TVM's importer, with layer names, one-sentence errors, and conversions it lacks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import tvm
from torch import fx
from torch.export.graph_signature import InputKind
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.names import NamingBuilder
from dance_tvm.frontend.torch_conversions import CONVERSIONS

_MAIN_ATEN = ("convolution", "mm", "norm", "pool", "matmul", "linear", "softmax", "upsample")


def import_program(program: torch.export.ExportedProgram) -> tuple[tvm.IRModule, dict[str, fx.Node]]:
    """The program as a Relax module, and for each of its variables' names the node of ``program`` it holds.

    ``program`` must be decomposed and static (see ``decompose``). Raises DanceError that names the operator and the
    layer where a conversion is missing.
    """
    importer = _Importer(program)
    mod = importer.from_exported_program(
        program,
        keep_params_as_input=False,
        unwrap_unit_return_tuple=False,
        no_bind_return_tuple=False,
        custom_convert_map=CONVERSIONS,
    )
    mod = relax.transform.DeadCodeElimination()(relax.transform.CanonicalizeBindings()(mod))
    return mod, {var.name: node for node, var in importer.env.items() if isinstance(var, relax.Var)}


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` in core ATen operators. Raises DanceError where its shapes are dynamic or it is not for inference."""
    require_static(program)
    if any(spec.kind is InputKind.CUSTOM_OBJ for spec in program.graph_signature.input_specs):
        raise DanceError("The network holds custom objects, which cannot be compiled: export it without them.")
    try:
        program = program.run_decompositions()
    except Exception as problem:
        raise DanceError(f"PyTorch cannot decompose the exported program: {first_line(problem)}") from problem
    # Run-time assertions have no result and would keep the whole function from being a dataflow graph.
    for node in reversed(program.graph.nodes):
        if "aten._assert" in str(node.target) and not node.users:
            program.graph.erase_node(node)
    return program


def require_static(program: torch.export.ExportedProgram) -> None:
    """Raise DanceError where an input's shape is symbolic."""
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor) and any(isinstance(extent, torch.SymInt) for extent in value.shape):
            shape = ", ".join(str(extent) for extent in value.shape)
            raise DanceError(
                f"Input {node.name!r} has a dynamic shape ({shape}): export the network with fixed shapes, "
                "one artifact for each."
            )


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


class _Importer(ExportedProgramImporter):
    """TVM's importer, told which layer each node belongs to."""

    env: dict[fx.Node, Any]

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self._tensors = _parameters(program)

    def parameter(self, node: Any) -> torch.Tensor | None:
        """The value of a weight, buffer or constant; None for what is computed."""
        return self._tensors.get(node.name)

    @property
    def block_builder(self) -> NamingBuilder:
        return self._naming_builder

    @block_builder.setter
    def block_builder(self, plain: relax.BlockBuilder | None) -> None:
        # TVM makes a fresh builder for each program; ours takes its place.
        self._naming_builder = NamingBuilder()

    def _check_unsupported_func_type(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            if node.op == "call_function" and _name_of(node.target) not in self.convert_map:
                raise DanceError(f"The operator {node.target} of layer {describe(node)!r} is not supported.")

    def _translate_fx_graph(
        self, graph_module: Any, nodes: Any, inputs_vars: dict[str, Any], custom_ops: set[str] | None = None
    ) -> tuple[Any, ...]:
        names = _names(list(nodes))
        for node in nodes:
            if node.op == "placeholder":
                self.env[node] = inputs_vars[node.name]
            elif node.op == "get_attr":
                self.env[node] = getattr(graph_module, node.target)
            elif node.op == "output":
                return self._flatten_output_args(self.retrieve_args(node)[0])
            else:
                self.env[node] = self._convert(node, names[node], custom_ops or set())
        raise DanceError("The exported program returns nothing.")

    def _convert(self, node: fx.Node, name: tuple[str, bool], custom_ops: set[str]) -> Any:
        operator = _name_of(node.target)
        convert: Callable[..., Any] = self.convert_map[operator]
        self.block_builder.enter(name[0], only=name[1])
        try:
            value = convert(node, self) if operator in custom_ops else convert(node)
        except DanceError as problem:
            raise DanceError(f"The operator {node.target} of layer {describe(node)!r}: {problem}") from None
        except Exception as problem:
            raise DanceError(
                f"The operator {node.target} of layer {describe(node)!r} is not supported in this form: "
                f"{first_line(problem)}"
            ) from problem
        if isinstance(value, relax.Expr) and not isinstance(value, relax.Var):
            value = self.block_builder.emit(value)
        return self._agree(node, value)

    def _agree(self, node: fx.Node, value: Any) -> Any:
        """``value`` with the dtype that PyTorch gives ``node``; a different shape is an error, told here."""
        expected = node.meta.get("val")
        if not (isinstance(expected, torch.Tensor) and isinstance(value, relax.Expr)):
            return value
        if not isinstance(value.ty, relax.TensorType):
            return value
        shape = tuple(int(extent) for extent in value.ty.shape)
        if shape != tuple(expected.shape):
            raise DanceError(
                f"The operator {node.target} of layer {describe(node)!r} is not supported in this form: "
                f"it would be imported with shape {shape} in place of {tuple(expected.shape)}."
            )
        dtype = self._convert_data_type(expected.dtype, self.env)
        return value if str(value.ty.dtype.dtype) == dtype else self.block_builder.emit(relax.op.astype(value, dtype))


def _parameters(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Weights, buffers and constants by the name of their placeholder."""
    named = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
    signature = program.graph_signature.input_specs
    return {spec.arg.name: named[spec.target].detach() for spec in signature if spec.target in named}


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
