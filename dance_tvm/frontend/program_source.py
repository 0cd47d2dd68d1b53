"""An exported program as the source that an import is checked with: what it takes, what it gives, and its values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.equal_values import equal_values_as_they_stood
from dance_tvm.frontend.interface import Arrays, TensorSpec, array_of, tensor_of, usual_meaning
from dance_tvm.frontend.torch_program import Decomposed, describe

# How far a network may move, as a share of its largest value, when float32 takes the place of its own type.
_ROUNDING = {torch.float16: 0.05, torch.bfloat16: 0.2, torch.float64: 1e-3}


class ProgramSource:
    """``program`` as it came, and ``decomposed`` into core operators that compute in float32."""

    def __init__(self, program: torch.export.ExportedProgram, decomposed: Decomposed) -> None:
        self.program, self.decomposed = program, decomposed
        self._kept: torch.nn.Module | None = None

    def inputs(self) -> list[TensorSpec]:
        """The tensors that the network takes; what else it takes was fixed when it was exported."""
        return [
            _spec(spec.arg.name, value, usual_meaning(tuple(value.shape), str(value.dtype)))
            for spec, value in self._taken()
        ]

    def outputs(self) -> list[TensorSpec]:
        """The tensors and numbers that the network gives, named after their places in its result; None is left out."""
        values = {node.name: node.meta.get("val") for node in self.program.graph.nodes}
        given = [s.arg for s in self.program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
        tree = pytree.tree_unflatten(list(range(len(given))), self.program.call_spec.out_spec)
        names = [_output_name(keys) for keys, _ in pytree.tree_flatten_with_path(tree)[0]]
        specs: list[TensorSpec] = []
        for name, argument in zip(names, given, strict=True):
            value = argument.value if isinstance(argument, ConstantArgument) else values[argument.name]
            if value is None:
                continue
            if not isinstance(value, (torch.Tensor, bool, int, float)):
                raise DanceError(f"{name} of the network is {value!r}, not a tensor: leave it out when exporting")
            value = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
            specs.append(_spec(name, value, f"output {len(specs)} of the network"))
        return specs

    def examples(self) -> dict[str, np.ndarray]:
        """The inputs that the network was exported with, where the program kept them."""
        kept = self.program.example_inputs
        leaves = pytree.tree_leaves(kept) if kept else []
        named = zip(filter(_is_users, self.program.graph_signature.input_specs), leaves, strict=False)
        return {spec.arg.name: array_of(leaf) for spec, leaf in named if isinstance(leaf, torch.Tensor)}

    def run(self, arrays: Arrays) -> list[np.ndarray]:
        """The network's outputs for arrays by input name, as it computes in float32."""
        found = self._in_float32(arrays) if self.decomposed.declared else self._as_it_came(arrays)
        return [array_of(value) for value in found]

    def require_same_in_float32(self, arrays: Arrays) -> None:
        """Raise DanceError where a network of another type than float32 is another one when it computes in float32."""
        if not self.decomposed.declared:
            return
        allowed = max(_ROUNDING[dtype] for dtype in self.decomposed.declared)
        for spec, a, b in zip(self.outputs(), self._in_float32(arrays), self._as_it_came(arrays), strict=True):
            a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
            there = b.isfinite()
            apart = (a - b)[there].abs().nan_to_num(float("inf")).max() if there.any() else torch.zeros(())
            if apart > allowed * b[there].abs().amax().clamp(min=1e-6):
                raise DanceError(
                    f"the network computes in {_names(self.decomposed.declared)}, and {spec.name} is another one in "
                    "float32, in which it would be built here: export it in float32"
                )

    def intermediates(self, nodes: dict[str, torch.fx.Node], arrays: Arrays) -> dict[str, tuple[str, torch.Tensor]]:
        """For each variable that holds a node of the decomposed program: its layer, and its value in PyTorch."""
        wanted = {node: name for name, node in nodes.items()}
        found: dict[str, tuple[str, torch.Tensor]] = {}

        class Recorder(torch.fx.Interpreter):
            def run_node(self, node: torch.fx.Node) -> Any:
                value = super().run_node(node)
                if node in wanted and isinstance(value, torch.Tensor):
                    found[wanted[node]] = (describe(node), value)
                return value

        with torch.inference_mode(), equal_values_as_they_stood(self.decomposed.program.graph):
            Recorder(self.decomposed.program.graph_module).run(*self._arguments(arrays))
        return found

    def _taken(self) -> list[tuple[InputSpec, torch.Tensor]]:
        values = {node.name: node.meta.get("val") for node in self.program.graph.nodes if node.op == "placeholder"}
        taken = []
        for spec in self.program.graph_signature.input_specs:
            if not _is_users(spec) or isinstance(spec.arg, ConstantArgument):
                continue
            value = values.get(spec.arg.name)
            if not (isinstance(spec.arg, TensorArgument) and isinstance(value, torch.Tensor)):
                raise DanceError(f"input {spec.arg.name!r} of the network is not a tensor: fix it when exporting")
            taken.append((spec, value))
        return taken

    def _module(self) -> torch.nn.Module:
        """The program as a module; one with a state that its calls change begins anew each time."""
        if self.program.graph_signature.buffers_to_mutate:
            return self.program.module()
        if self._kept is None:
            self._kept = self.program.module()
        return self._kept

    def _as_it_came(self, arrays: Arrays) -> list[Any]:
        leaves = [
            spec.arg.value if isinstance(spec.arg, ConstantArgument) else tensor_of(arrays[spec.arg.name]).clone()
            for spec in self.program.graph_signature.input_specs
            if _is_users(spec)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.program.call_spec.in_spec)
        with torch.inference_mode(), equal_values_as_they_stood(self.program.graph):
            results = self._module()(*args, **kwargs)
        return [value for value in pytree.tree_leaves(results) if value is not None]

    def _in_float32(self, arrays: Arrays) -> list[Any]:
        with torch.inference_mode(), equal_values_as_they_stood(self.decomposed.program.graph):
            results = torch.fx.Interpreter(self.decomposed.program.graph_module).run(*self._arguments(arrays))
        kinds = [spec.kind for spec in self.decomposed.program.graph_signature.output_specs]
        given = [value for value, kind in zip(results, kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
        return [
            value.to(getattr(torch, spec.dtype)) if isinstance(value, torch.Tensor) else value
            for value, spec in zip([value for value in given if value is not None], self.outputs(), strict=True)
        ]

    def _arguments(self, arrays: Arrays) -> list[Any]:
        """What the decomposed program's graph takes."""
        program = self.decomposed.program
        tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
        arguments: list[Any] = []
        for spec in program.graph_signature.input_specs:
            if spec.kind is not InputKind.USER_INPUT:
                arguments.append(tensors[str(spec.target)])
            elif isinstance(spec.arg, ConstantArgument):
                arguments.append(spec.arg.value)
            else:
                value = tensor_of(arrays[spec.arg.name]).clone()
                arguments.append(value.float() if value.dtype in self.decomposed.declared else value)
        return arguments


def _is_users(spec: InputSpec) -> bool:
    return spec.kind is InputKind.USER_INPUT


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _output_name(keys: Any) -> str:
    """``output`` for a single result, ``output_1`` or ``output_scores`` for a part of a tuple or a dictionary."""
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in keys]
    return "_".join(["output", *parts])


def _spec(name: str, value: torch.Tensor, meaning: str) -> TensorSpec:
    if free_unbacked_symbols(value):
        raise DanceError(
            f"{meaning} has a size that depends on values, as by a mask in brackets or nonzero: multiply by the mask, "
            "or take a fixed number with topk"
        )
    return TensorSpec(name, tuple(int(n) for n in value.shape), str(value.dtype).removeprefix("torch."), meaning)
