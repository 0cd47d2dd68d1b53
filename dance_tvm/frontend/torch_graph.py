"""Rewrite a decomposed program's graph: compute in float32, and fold what depends on no input."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

# Types that a network may declare and that nothing here computes in.
_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)

# A constant that is computed from little, as zeros are, stays computed unless it is small.
_FOLDED_BYTES = 64 * 1024
_CAST = torch.ops.aten._to_copy.default


def compute_in_float32(program: torch.export.ExportedProgram) -> set[torch.dtype]:
    """Put float32 in the place of every other float type in ``program``'s weights and graph; the types replaced.

    ``program``'s own dictionaries and graph change, the tensors that it was given stay as they are.
    """
    declared = {
        value.dtype
        for node in program.graph.nodes
        for value in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(value, torch.Tensor) and value.dtype in _OTHER_FLOATS
    }
    if not declared:
        return declared
    for held in (program.state_dict, program.constants):
        for name, tensor in held.items():
            if isinstance(tensor, torch.Tensor) and tensor.dtype in declared:
                wide = tensor.detach().float()
                held[name] = torch.nn.Parameter(wide) if isinstance(tensor, torch.nn.Parameter) else wide
    for node in program.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(_widened, (node.args, dict(node.kwargs)))
    program.graph_module.recompile()
    _propagate(program)
    return declared


def _widened(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in _OTHER_FLOATS else value


def _propagate(program: torch.export.ExportedProgram) -> None:
    """Types and shapes of every node once more, from the placeholders' shapes."""
    mode = FakeTensorMode()
    arguments = []
    with mode:
        for node in program.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                dtype = torch.float32 if value.dtype in _OTHER_FLOATS else value.dtype
                value = torch.empty_strided(value.shape, value.stride(), dtype=dtype)
            arguments.append(value)
    FakeTensorProp(program.graph_module, mode).propagate_dont_convert_inputs(*arguments)


def cast_operands(program: torch.export.ExportedProgram) -> None:
    """Write out as casts what PyTorch promotes without a word, in operators that Relax has for one type alone.

    Parts of a concatenation take the type of the whole; integers and booleans that an elementwise operator makes floats
    of (``exp``, ``sin``) are floats before it.
    """
    for node in list(program.graph.nodes):
        result = node.meta.get("val")
        if node.op != "call_function" or not isinstance(result, torch.Tensor):
            continue
        types = {source: source.meta["val"].dtype for source in node.all_input_nodes if _is_tensor(source)}
        of_integers = result.is_floating_point() and not any(dtype.is_floating_point for dtype in types.values())
        elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) and node.target is not _CAST
        if node.target is not torch.ops.aten.cat.default and not (elementwise and of_integers):
            continue
        for source, dtype in types.items():
            if dtype != result.dtype:
                with program.graph.inserting_before(node):
                    promoted = program.graph.call_function(_CAST, (source,), {"dtype": result.dtype})
                promoted.meta = {**node.meta, "val": source.meta["val"].to(result.dtype)}
                node.replace_input_with(source, promoted)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def fold_constants(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """By the name of its node the value of each weight, buffer, constant, and of what is computed from these alone.

    What takes much more room than what it is computed from is left to be computed. A tensor of no elements is known,
    whatever it was made of.
    """
    known: dict[fx.Node, Any] = {}
    named = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
    targets = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder" and targets.get(node.name) in named:  # tokens of effects have no value
                known[node] = named[targets[node.name]].detach()
            elif node.op in ("call_function", "placeholder") and _is_empty(node.meta.get("val")):
                known[node] = pytree.tree_map_only(torch.Tensor, _empty, node.meta["val"])
            elif node.op == "call_function" and _is_foldable(node, known):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
    return {node.name: value for node, value in known.items() if isinstance(value, torch.Tensor)}


def _is_foldable(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    if any(source not in known for source in node.all_input_nodes):
        return False
    used = sum(_bytes(known[source]) for source in node.all_input_nodes)
    return _bytes(node.meta.get("val")) <= max(used, _FOLDED_BYTES)


def _is_empty(value: Any) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    known = all(isinstance(extent, int) for tensor in tensors for extent in tensor.shape)
    return bool(tensors) and known and all(0 in tensor.shape for tensor in tensors)


def _empty(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(tuple(value.shape), dtype=value.dtype)


def _bytes(value: Any) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
