"""Turn a network, wherever it comes from, into one checked Relax module."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from dance_tvm import models
from dance_tvm.core.errors import DanceError
from dance_tvm.core.hashing import file_sha256
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.frontend.check import check_import
from dance_tvm.frontend.files import load_program, load_weights, require_file
from dance_tvm.frontend.interface import Arrays, Imported, TensorSpec, usual_meaning
from dance_tvm.frontend.torch_program import decompose, describe, first_line, import_program, require_static

Weights = str | Path | Mapping[str, torch.Tensor]


def import_model(
    model: str | Path | nn.Module | torch.export.ExportedProgram,
    *,
    weights: Weights | None = None,
    example_inputs: Sequence[torch.Tensor] | None = None,
    check: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Imported:
    """Import a zoo network by name, a ``.pt2`` or ``.onnx`` file, a module (with ``example_inputs``), or a program.

    ``weights`` replaces the source's: a safetensors file, a state dict's file, or tensors by name. A zoo network whose
    weights are published gets those where none are given. With ``check`` the result is compared with the source on
    random input. Raises DanceError for unknown names, bad files, wrong weights, dynamic shapes, unsupported operators
    (named, with their layer) and differences (naming the first layer that diverges).
    """
    with warnings.catch_warnings():
        # PyTorch's exporter warns of its own deprecations, which tell a user of this function nothing.
        warnings.simplefilter("ignore")
        if isinstance(model, nn.Module):
            return _import_module(model, type(model).__name__, weights, example_inputs, check)
        if isinstance(model, torch.export.ExportedProgram):
            return _import_exported(model, "program", _program_sha256(model), weights, check)
        return _import_named(str(model), weights, example_inputs, check, shapes)


def _import_named(
    model: str,
    weights: Weights | None,
    example_inputs: Sequence[torch.Tensor] | None,
    check: bool,
    shapes: Mapping[str, Sequence[int]] | None,
) -> Imported:
    path = Path(model)
    if path.suffix == ".onnx":
        try:
            from dance_tvm.frontend.onnx_graph import import_onnx
        except ImportError:
            raise DanceError("Reading ONNX files needs the onnx package: pip install 'dance-tvm[onnx]'.") from None
        if weights is not None:
            raise DanceError("An ONNX file carries its weights: leave --weights out, or export the network again.")
        require_file(path, "model")
        return import_onnx(path, check=check, shapes=shapes)
    if path.suffix == ".pt2":
        return _import_exported(load_program(path), path.stem, None, weights, check, path)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle"):
        raise DanceError(
            f"{path} holds weights or pickled code, not a network: give a .pt2 or .onnx file, or a network's name "
            "with --weights."
        )
    if path.suffix and (path.exists() or path.parent != Path(".")):
        require_file(path, "model")
        raise DanceError(f"{path} is no model file that is known here: give a .pt2 or an .onnx file.")
    entry = models.entry(model)
    network = models.pretrained(model) if entry.pretrained and weights is None else _seeded(model, weights)
    return _import_module(network, model, weights, example_inputs or models.example_inputs(model), check, entry)


def _seeded(name: str, weights: Weights | None) -> nn.Module:
    """The zoo's network with as many classes as ``weights`` has."""
    if weights is None:
        return models.create(name)
    return models.create(name, **models.options_for(name, _state(weights)))


def _state(weights: Weights) -> Mapping[str, torch.Tensor]:
    return load_weights(Path(weights)) if isinstance(weights, (str, Path)) else weights


def _import_module(
    module: nn.Module,
    name: str,
    weights: Weights | None,
    example_inputs: Sequence[torch.Tensor] | None,
    check: bool,
    entry: models.ModelEntry | None = None,
) -> Imported:
    if example_inputs is None:
        raise DanceError("A module needs example_inputs, a tuple of tensors of the shapes that it will be run with.")
    if weights is not None:
        models.load_state(module, _state(weights))
    was_training = module.training
    try:
        program = torch.export.export(module.eval(), tuple(example_inputs), strict=False)
    except Exception as problem:
        raise DanceError(f"PyTorch cannot export {name}: {first_line(problem)}") from problem
    finally:
        module.train(was_training)
    return _import_exported(program, name, _program_sha256(program), None, check, entry=entry)


def _import_exported(
    program: torch.export.ExportedProgram,
    name: str,
    sha256: str | None,
    weights: Weights | None,
    check: bool,
    path: Path | None = None,
    entry: models.ModelEntry | None = None,
) -> Imported:
    require_static(program)
    if weights is not None:
        _replace_weights(program, _state(weights))
        sha256 = _program_sha256(program)
    inputs, outputs = _inputs(program, entry), _outputs(program, entry)
    decomposed = decompose(program)
    mod, nodes = import_program(decomposed)

    def reference(arrays: Arrays) -> Arrays:
        with torch.inference_mode():
            results = _call(program, [torch.from_numpy(arrays[spec.name]) for spec in inputs])
        return {spec.name: value.numpy() for spec, value in zip(outputs, results, strict=True)}

    if check:
        arrays = random_inputs(inputs)
        check_import(mod, arrays, reference(arrays), lambda: _intermediates(decomposed, nodes, arrays))
    digest = sha256 or file_sha256(path) if path else sha256 or _program_sha256(program)
    return Imported(mod, name, digest, inputs, outputs, reference)


def _call(program: torch.export.ExportedProgram, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    args, kwargs = pytree.tree_unflatten(arguments, program.call_spec.in_spec)
    return [value for value in pytree.tree_leaves(program.module()(*args, **kwargs)) if value is not None]


def _intermediates(
    program: torch.export.ExportedProgram, nodes: dict[str, torch.fx.Node], arrays: Arrays
) -> dict[str, tuple[str, torch.Tensor]]:
    """For each variable that holds a node of ``program``: its layer, and its value in PyTorch."""
    wanted = {node: name for name, node in nodes.items()}
    found: dict[str, tuple[str, torch.Tensor]] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if node in wanted and isinstance(value, torch.Tensor):
                found[wanted[node]] = (describe(node), value)
            return value

    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
    given = iter(arrays.values())
    arguments = [
        torch.from_numpy(next(given)) if spec.kind is InputKind.USER_INPUT else tensors[str(spec.target)]
        for spec in program.graph_signature.input_specs
    ]
    with torch.inference_mode():
        Recorder(program.graph_module).run(*arguments)
    return found


def _inputs(program: torch.export.ExportedProgram, entry: models.ModelEntry | None) -> list[TensorSpec]:
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            continue
        value = placeholders.get(spec.arg.name)
        if not isinstance(value, torch.Tensor):
            raise DanceError(f"Input {spec.arg.name!r} of the network is not a tensor: fix it when exporting.")
        meaning = entry.input_meaning if entry else usual_meaning(tuple(value.shape), str(value.dtype))
        specs.append(_spec(spec.arg.name, value, meaning))
    return specs


def _outputs(program: torch.export.ExportedProgram, entry: models.ModelEntry | None) -> list[TensorSpec]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    user = [s.arg.name for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    tree = pytree.tree_unflatten(list(range(len(user))), program.call_spec.out_spec)
    names = [_output_name(keys) for keys, _ in pytree.tree_flatten_with_path(tree)[0]]
    meanings = [f"output {index} of the network" for index in range(len(user))]
    if entry and len(entry.outputs) == len(user):
        names, meanings = [list(column) for column in zip(*entry.outputs, strict=True)]
    return [_spec(name, values[of], meaning) for name, of, meaning in zip(names, user, meanings, strict=True)]


def _output_name(keys: Any) -> str:
    """``output`` for a single result, ``output_1`` or ``output_scores`` for a part of a tuple or a dictionary."""
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in keys]
    return "_".join(["output", *parts])


def _spec(name: str, value: Any, meaning: str) -> TensorSpec:
    return TensorSpec(name, tuple(int(n) for n in value.shape), str(value.dtype).removeprefix("torch."), meaning)


def _replace_weights(program: torch.export.ExportedProgram, state: Mapping[str, torch.Tensor]) -> None:
    own = program.state_dict
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    wrong = sorted(name for name in set(own) & set(state) if own[name].shape != state[name].shape)
    told = [
        f"{kind}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if told:
        raise DanceError(f"The weights do not fit the exported program: {'; '.join(told)}.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _program_sha256(program: torch.export.ExportedProgram) -> str:
    """A digest of the program's code and weights, the same in every process."""
    digest = hashlib.sha256(program.graph_module.code.encode())
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
