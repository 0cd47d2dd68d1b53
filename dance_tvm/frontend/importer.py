"""Turn a network, wherever it comes from, into one checked Relax module."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dance_tvm import models
from dance_tvm.core.errors import DanceError, unexpected_told
from dance_tvm.core.hashing import file_sha256
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.frontend.check import check_import
from dance_tvm.frontend.files import load_program, load_weights
from dance_tvm.frontend.interface import Arrays, Imported
from dance_tvm.frontend.program_source import ProgramSource
from dance_tvm.frontend.ranges import with_ranges
from dance_tvm.frontend.torch_program import decompose, first_line, import_program, require_inference
from dance_tvm.frontend.torch_shapes import Shapes, with_shapes
from dance_tvm.models.network_files import require_onnx
from dance_tvm.models.registry import require_source

Weights = str | Path | Mapping[str, torch.Tensor]


def load_exporter() -> None:
    """Load the parts of PyTorch that export, read and decompose networks: a second or more, which else the first of
    these takes."""
    import torch._dynamo  # noqa: F401  # torch.export needs all of it


def import_model(
    model: str | Path | nn.Module | torch.export.ExportedProgram,
    *,
    weights: Weights | None = None,
    example_inputs: Sequence[torch.Tensor] | None = None,
    check: bool = True,
    shapes: Shapes | None = None,
    batch: int | None = None,
) -> Imported:
    """Import a zoo network by name, a ``.pt2`` or ``.onnx`` file, a module (with ``example_inputs``), or a program.

    ``weights`` replaces the source's: a safetensors file, a state dict's file, or tensors by name. A module is given
    them for good, as by ``load_state_dict``; a program is left as it was. A zoo network whose
    weights are published gets those where none are given. ``shapes``, by input name, fix the dimensions that a file or
    a program leaves open; ``batch`` is the first dimension of all inputs, for networks of the zoo and where it is open.
    ``example_inputs`` beside a file or a program must have its shapes.
    With ``check`` the result is compared with the source on random input. Raises DanceError for
    unknown names, bad files, wrong weights, open dimensions, unsupported operators (named, with their layer) and
    differences (naming the first layer that diverges).
    """
    with warnings.catch_warnings(), unexpected_told(lambda: "Importing the network"):
        # PyTorch's exporter warns of its own deprecations, which mean nothing to a user of this function.
        warnings.simplefilter("ignore")
        if isinstance(model, nn.Module):
            if shapes or batch is not None:
                raise DanceError("a module is exported with the shapes of example_inputs: leave shapes and batch out")
            return _import_module(model, type(model).__name__, weights, example_inputs, check)
        if isinstance(model, torch.export.ExportedProgram):
            imported = _import_exported(
                model, "program", _program_sha256(model), weights, check, shapes=shapes, batch=batch
            )
        else:
            imported = _import_named(str(model), weights, example_inputs, check, shapes, batch)
        if example_inputs is not None:
            _require_shapes(imported, example_inputs)
        return imported


def _require_shapes(imported: Imported, example_inputs: Sequence[torch.Tensor]) -> None:
    """Raise DanceError where a network that has shapes of its own is given inputs of others."""
    given = [tuple(leaf.shape) for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, torch.Tensor)]
    if given != [tuple(spec.shape) for spec in imported.inputs]:
        own = ", ".join(f"{spec.name} {tuple(spec.shape)}" for spec in imported.inputs)
        raise DanceError(
            f"example_inputs of the shapes {', '.join(map(str, given)) or '()'} are not those of {imported.name}, "
            f"which takes {own}: leave them out, or export it for them"
        )


def _import_named(
    model: str,
    weights: Weights | None,
    example_inputs: Sequence[torch.Tensor] | None,
    check: bool,
    shapes: Shapes | None,
    batch: int | None,
) -> Imported:
    path = Path(model)
    require_source(model)
    if path.suffix == ".onnx":
        require_onnx(path, has_weights=weights is not None)
        from dance_tvm.frontend.onnx_graph import import_onnx

        return import_onnx(path, check=check, shapes=shapes, batch=batch)
    if path.suffix == ".pt2":
        return _import_exported(load_program(path), path.stem, None, weights, check, path, shapes=shapes, batch=batch)
    entry = models.entry(model)
    if shapes:
        raise DanceError(f"shapes fix what a file leaves open, and {model} leaves nothing open but its batch")
    if batch is not None and example_inputs is not None:
        raise DanceError("example_inputs have a batch of their own: leave batch out, or them")
    inputs = example_inputs or models.example_inputs(model, batch=batch or 1)
    network = models.pretrained(model) if entry.pretrained and weights is None else _seeded(model, weights)
    return _import_module(network, model, weights, inputs, check, entry)


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
        raise DanceError("a module needs example_inputs, a tuple of tensors of the shapes that it will be run with")
    if isinstance(example_inputs, torch.Tensor):
        raise DanceError("example_inputs is a tuple of tensors, one for each input: give (tensor,) for a single one")
    if weights is not None:
        models.load_state(module, _state(weights))
    modes = [(each, each.training) for each in module.modules()]
    try:
        program = torch.export.export(module.eval(), tuple(example_inputs), strict=False)
    except Exception as problem:
        raise DanceError(f"PyTorch cannot export {name}: {first_line(problem)}") from problem
    finally:
        module.train(modes[0][1])
        for each, mode in modes:
            each.training = mode
    return _import_exported(program, name, _program_sha256(program), None, check, entry=entry)


def _import_exported(
    program: torch.export.ExportedProgram,
    name: str,
    sha256: str | None,
    weights: Weights | None,
    check: bool,
    path: Path | None = None,
    entry: models.ModelEntry | None = None,
    shapes: Shapes | None = None,
    batch: int | None = None,
) -> Imported:
    program = with_shapes(program, shapes or {}, batch)
    require_inference(program)
    if weights is not None:
        program = _with_weights(program, _state(weights))
        sha256 = _program_sha256(program)
    source = ProgramSource(program, decompose(program))
    inputs, outputs = source.inputs(), source.outputs()
    if entry:
        inputs = [replace(spec, meaning=entry.input_meaning, range=entry.input_range) for spec in inputs]
        if len(entry.outputs) == len(outputs):
            named = zip(outputs, entry.outputs, strict=True)
            outputs = [replace(spec, name=name, meaning=meaning) for spec, (name, meaning) in named]
    mod, nodes = import_program(source.decomposed, inputs, outputs)

    def reference(arrays: Arrays) -> Arrays:
        return {spec.name: value for spec, value in zip(outputs, source.run(arrays), strict=True)}

    inputs = with_ranges(inputs, reference, source.examples())
    if check:
        source.require_same_in_float32(random_inputs(inputs))
        check_import(mod, inputs, reference, lambda arrays: source.intermediates(nodes, arrays))
    digest = sha256 or file_sha256(path) if path else sha256 or _program_sha256(program)
    return Imported(mod, name, digest, inputs, outputs, reference, video=models.published_video(entry))


def _with_weights(
    program: torch.export.ExportedProgram, state: Mapping[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    own = program.state_dict
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    wrong = sorted(name for name in set(own) & set(state) if own[name].shape != state[name].shape)
    if problems := models.misfits(missing, unexpected, wrong):
        raise DanceError(f"the weights do not fit the exported program: {problems}")
    replaced = {name: state[name].detach().to(tensor) for name, tensor in own.items()}
    learned = {
        name: nn.Parameter(replaced[name], tensor.requires_grad)
        for name, tensor in own.items()
        if isinstance(tensor, nn.Parameter)
    }
    return torch.export.ExportedProgram(
        program.graph_module,
        program.graph,
        program.graph_signature,
        {**replaced, **learned},
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


def _program_sha256(program: torch.export.ExportedProgram) -> str:
    """A digest of the program's code and weights, the same in every process.

    The parts that run in a mode of their own, as under ``torch.autocast``, are modules within the program's.
    """
    digest = hashlib.sha256()
    for part, module in program.graph_module.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            digest.update(f"{part} {module.code}".encode())
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
