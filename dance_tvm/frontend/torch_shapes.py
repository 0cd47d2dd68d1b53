"""Fix the dimensions that an exported program leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument
from torch.utils import _pytree as pytree

from dance_tvm.core.errors import DanceError
from dance_tvm.frontend.torch_program import first_line
from dance_tvm.models.network_inputs import require_shape

Shapes = Mapping[str, Sequence[int]]


def with_shapes(
    program: torch.export.ExportedProgram, shapes: Shapes, batch: int | None = None
) -> torch.export.ExportedProgram:
    """``program`` itself where nothing is open, else the program for inputs of ``shapes``, by the input's name,
    or of ``batch`` clips.

    Raises DanceError where an open shape is not given, and where a given one does not fit.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    declared = {
        spec.arg.name: [str(n) if isinstance(n, torch.SymInt) else int(n) for n in values[spec.arg.name].shape]
        for spec in specs
        if isinstance(values.get(spec.arg.name), torch.Tensor)
    }
    chosen = require_shape(declared, shapes, batch)
    is_open = any(isinstance(n, str) for shape in declared.values() for n in shape)
    is_open = is_open or any(not isinstance(s.arg, (ConstantArgument, TensorArgument)) for s in specs)
    if not is_open:
        return program
    leaves: list[Any] = []
    for spec in specs:
        if isinstance(spec.arg, ConstantArgument):
            leaves.append(spec.arg.value)
        elif spec.arg.name in chosen:
            leaves.append(torch.zeros(chosen[spec.arg.name], dtype=values[spec.arg.name].dtype))
        else:
            raise DanceError(f"input {spec.arg.name!r} of the network is a number: fix it when exporting")
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    try:
        return torch.export.export(program.module(), args, kwargs, strict=False)
    except Exception as problem:
        raise DanceError(f"the network does not take inputs of the shapes given: {first_line(problem)}") from problem
