"""From a PyTorch module to a file that builds take: evaluation mode, shapes, the exported program compared."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dance_tvm import models
from dance_tvm.artifact.preprocess import Preprocess
from dance_tvm.core.agreement import difference
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import written_whole
from dance_tvm.core.verbosity import level
from dance_tvm.frontend.interface import array_of
from dance_tvm.frontend.torch_program import first_line
from dance_tvm.models.network_files import require_python, weights_file

MOST_DIFFERENCE = 1e-3

#: PyTorch's loggers that speak while a network is exported that has nothing wrong with it.
_TALKATIVE = ("torch.fx.experimental.symbolic_shapes", "torch.onnx")

#: What the exporter says, and what to do about it.
ADVICE = (
    (
        r"data-dependent|GuardOnDataDependent|Could not guard|bool\(\) on|Dynamic control flow",
        "its code decides by the values of a tensor (an `if`, a loop, `.item()`): multiply by a mask or take "
        "torch.where instead, or move the decision out of the network",
    ),
    (
        r"Constraints violated|dynamic_shapes|specialized|mark_dynamic",
        "a dimension that was to stay open is fixed by its code, as in `x.view(1, …)`: write -1 or x.shape[0] there, "
        "or leave --open-batch out",
    ),
    (
        r"size mismatch|shapes? cannot be|Expected .*([Dd]im|size)|expected input|mat1 and mat2|should be greater than "
        r"kernel",
        "it does not take an input of this shape: --shape is N x C x T x H x W as in its training",
    ),
    (
        r"missing \d+ required positional|takes \d+ positional|unexpected keyword",
        "forward takes other arguments: give one --shape for each, in order",
    ),
    (
        r"pytree|Unsupported input type|not a supported",
        "it takes or gives objects that are no tensors: wrap it in a module whose forward takes and gives tensors",
    ),
)
OTHERWISE = "wrap it in a module whose forward consists of tensor operations only (docs/export.md)"


@dataclass(frozen=True)
class Source:
    """A module, what its input is called for, and how its videos are prepared where that is known."""

    name: str
    module: nn.Module
    preprocess: Preprocess | None = None


def load_source(spec: str, weights: str | None = None) -> Source:
    """A network of the zoo, ``torchvision:NAME``, ``pytorchvideo:NAME``, or ``MODULE:NAME`` of plain Python.

    ``weights``: what torchvision calls them (DEFAULT), ``pretrained`` for pytorchvideo, or a file of a state dict.
    Raises DanceError for unknown names, code that fails and weights that do not fit.
    """
    place, _, name = spec.partition(":")
    file = weights_file(weights, place) if weights else None
    named = None if file else weights
    if not name:
        models.entry(place)
        source = Source(place, models.create(place))
    elif place == "torchvision":
        source = _torchvision(name, named)
    elif place == "pytorchvideo":
        source = _pytorchvideo(name, named)
    else:
        source = Source(name, _plain(place, name))
    if named and place not in ("torchvision", "pytorchvideo"):
        raise DanceError(f"--weights {named} is not a file: {spec} takes a state dict (.pt, .pth, .safetensors)")
    if file is not None:
        from dance_tvm.frontend.files import load_weights

        models.load_state(source.module, load_weights(file))
    return source


def export(
    module: nn.Module, shapes: Sequence[Sequence[int]], out: Path, *, open_batch: bool = False, seed: int = 0
) -> float:
    """Write ``out`` (.pt2 or .onnx) and return how far the exported program's outputs are from the module's.

    The module is put into evaluation mode. ``open_batch`` leaves the first dimension of all inputs open. Raises
    DanceError, with what to do, where PyTorch cannot export it or where the program computes something else.
    """
    generator = torch.Generator().manual_seed(seed)
    # A dimension of extent 1 is taken for a constant, so an open one is shown as 2.
    inputs = tuple(
        torch.randn(max(2, shape[0]) if open_batch else shape[0], *shape[1:], generator=generator) for shape in shapes
    )
    module = module.eval()
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in shapes) if open_batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.no_grad(), _quiet():
                expected = module(*inputs)
                program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
                apart = _apart(program.module()(*inputs), expected)
        except Exception as problem:
            raise DanceError(refusal(problem)) from problem
        if apart > MOST_DIFFERENCE:
            raise DanceError(
                f"the exported program differs from the module by {apart:.2g} of its largest value: something in it "
                "changes from call to call (dropout without .eval(), a counter, random numbers)"
            )
        with written_whole(out, "--out") as beside, _quiet():
            _write(program, beside, out.suffix)
    return apart


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to the exception what the exporter prints and logs of code it cannot follow, or of packages that it would
    know operators of, without -v."""
    if level() > 0:
        yield
        return
    levels = {logger: logger.level for logger in map(logging.getLogger, _TALKATIVE)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, before in levels.items():
            logger.setLevel(before)


def refusal(problem: Exception) -> str:
    """Why PyTorch exports no program of a network: what to do, where its code stands, and PyTorch's words."""
    said = re.sub(r"\s*\(unhinted: .*|\s*\(Size-like symbols: .*", "", first_line(problem)[:300]).rstrip(".")
    where = f" ({place})" if (place := _place_of(problem)) else ""
    return f"PyTorch cannot export it{where}: {advice(str(problem))}; PyTorch says {said!r}"


def _place_of(problem: Exception) -> str:
    """File and line of the network's own code that was run last; empty where none was."""
    ours = Path(__file__).parents[1]
    found = ""
    for frame in traceback.extract_tb(problem.__traceback__):
        is_installed = "site-packages" in frame.filename or frame.filename.startswith("<")
        if not is_installed and ours not in Path(frame.filename).resolve().parents:
            found = f"{Path(frame.filename).name}, line {frame.lineno}"
    return found


def advice(said: str) -> str:
    """What to do about an exporter's complaint."""
    return next((words for pattern, words in ADVICE if re.search(pattern, said)), OTHERWISE)


def write_preprocess(found: Preprocess, out: Path) -> Path:
    """Write how videos are prepared beside ``out``, as `build --preprocess` takes it."""
    path = out.with_suffix(".toml")
    lines = []
    for name, value in found.model_dump(exclude_none=True).items():
        lines.append(f"{name} = {list(value) if isinstance(value, tuple) else value}")
    with written_whole(path, "--out") as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _write(program: torch.export.ExportedProgram, path: Path, suffix: str) -> None:
    if suffix == ".onnx":
        try:
            converted = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
        except ImportError as error:
            raise DanceError(f"writing ONNX needs the {error.name} package: pip install 'dance-tvm[onnx]'") from None
        assert converted is not None
        converted.save(str(path))
        return
    content = io.BytesIO()  # PyTorch ends the process where it writes to a full disk itself
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _apart(found: Any, expected: Any) -> float:
    """The largest difference of any output as a share of its largest value; infinite where NaN differ in place."""
    pairs = zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True)
    tensors = [(ours, theirs) for ours, theirs in pairs if isinstance(theirs, torch.Tensor)]
    return max((difference(array_of(ours), array_of(theirs)) for ours, theirs in tensors), default=0.0)


def _torchvision(name: str, weights: str | None) -> Source:
    torchvision: Any = _package("torchvision")
    try:
        chosen = torchvision.models.get_weight(weights) if weights and "." in weights else None
        if weights and chosen is None:
            chosen = torchvision.models.get_model_weights(name)[weights]
        module = torchvision.models.get_model(name, weights=chosen)
    except (ValueError, KeyError) as problem:
        raise DanceError(f"torchvision has no {name} with weights {weights}: {first_line(problem)}") from None
    found = chosen.transforms() if chosen is not None else None
    prepared = None
    if found is not None and hasattr(found, "mean"):
        size = list(getattr(found, "resize_size", []))
        resize = (size[0], size[-1]) if size else None
        prepared = Preprocess.model_validate(
            {"resize": resize, "mean": tuple(found.mean), "deviation": tuple(found.std)}
        )
    return Source(name, module, prepared)


def _pytorchvideo(name: str, weights: str | None) -> Source:
    hub: Any = _package("pytorchvideo.models.hub")
    make = getattr(hub, name, None)
    if make is None:
        raise DanceError(f"pytorchvideo's hub has no {name}: its models are listed in pytorchvideo.models.hub")
    # The scale of Kinetics that all of its published weights were trained in.
    prepared = Preprocess.model_validate({"mean": (0.45,) * 3, "deviation": (0.225,) * 3})
    return Source(name, make(pretrained=weights is not None), prepared)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DanceError(f"{package} cannot be loaded ({error}): pip install {package}") from None
    except RuntimeError as error:  # its compiled operators are of another build of PyTorch
        package = name.partition(".")[0]
        raise DanceError(
            f"{package} was built for another PyTorch than torch {torch.__version__} ({first_line(error)}): "
            f"install both from one index, as `pip install torch {package}` does"
        ) from None


def _plain(place: str, name: str) -> nn.Module:
    """What ``name`` of the module ``place`` is or, called without arguments, gives."""
    require_python(place, name)
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(place), name)
        made = made if isinstance(made, nn.Module) else made()
    except Exception as problem:
        raise DanceError(
            f"{place}:{name} gives no network ({type(problem).__name__}: {first_line(problem)}): name a function "
            "without arguments, or a module, that can be imported from this folder"
        ) from problem
    finally:
        sys.path.pop(0)
    if not isinstance(made, nn.Module):
        raise DanceError(f"{place}:{name} gives a {type(made).__name__}: it must give a torch.nn.Module")
    return made
