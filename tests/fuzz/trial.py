"""One program tried: built, run on poisoned memory with several inputs, compared; in a worker, where it may crash."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dance_tvm
from dance_tvm import DanceError, Options
from dance_tvm.frontend.interface import Imported
from dance_tvm.machines.target import load_target

from .machine import for_virtual_machine
from .memory import POISONS, Guard, poison_new_tensors
from .oracle import Answer, answer, draw_inputs, peak
from .program import Network, Program, write_out
from .sources import NotExportedError, bring_in, export, onnx_runtime

#: Verdicts that are findings; the others are "right", "refused" (one sentence), "unclear" (no input tells), "invalid".
FAULTS = ("wrong", "poison", "damage", "import differs", "check differs", "traceback", "crash", "timeout")
_STYLES = (
    ("normal", "on"),
    ("normal", "offset"),
    ("normal", "sparse"),
    ("normal", "off", "large"),
    ("normal", "small"),
)
_TRIES = 8


Case = tuple[str, list[Tensor], Answer]


@dataclass
class Verdict:
    """What came of a program, in a sentence and, for a wrong answer, the style of the input that shows it."""

    kind: str
    told: str = ""
    kernels: list[str] = field(default_factory=list)
    style: str = ""
    excess: float = 0.0

    @property
    def is_fault(self) -> bool:
        return self.kind in FAULTS

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_program(program: Program, guard: Guard) -> Verdict:
    """Build and judge ``program``."""
    torch.manual_seed(program.seed)
    try:
        network = write_out(program)
    except Exception as error:
        return Verdict("invalid", f"{type(error).__name__}: {error}"[:300])
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        return _for_each_batch(program, network, folder, guard)
    except NotExportedError as error:
        return Verdict("unclear", f"not exported: {error}")
    except DanceError as error:
        return _refusal(str(error))
    except Exception as error:
        last = traceback.format_exc().strip().splitlines()
        return Verdict("traceback", f"{type(error).__name__}: {str(error)[:300]} | {' '.join(last[-4:])[:400]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _for_each_batch(program: Program, network: Network, folder: Path, guard: Guard) -> Verdict:
    """The first fault, or the last verdict, of the sizes that an open batch is given; of the drawn one otherwise."""
    source, verdict = None, Verdict("unclear")
    for batch in program.options.get("open") or [None]:
        cases = list(_cases(network, program, batch))
        if not cases:
            continue
        source = source or export(program, network, draw_inputs(network, Random(0), "normal"), folder)
        imported = bring_in(source, network, cases[0][1], batch)
        read = [list(network.shapes).index(spec.name) for spec in imported.inputs]  # exporters drop unread inputs
        cases = [(style, [inputs[index] for index in read], told) for style, inputs, told in cases]
        if program.options.get("target", "host") == "host":
            verdict = _on_host(program, imported, cases, Path(tempfile.mkdtemp(dir=folder)), guard)
        else:
            verdict = _on_gpu(program, imported, cases)
        if verdict.kind == "wrong" and isinstance(source, Path) and _exporters_fault(source, cases):
            return Verdict("unclear", f"ONNX Runtime reads the file otherwise than PyTorch too: {verdict.told}")
        if verdict.is_fault:
            return verdict
    return verdict


def _exporters_fault(source: Path, cases: list[Case]) -> bool:
    """Whether another engine finds that the exported file is not the network."""
    if source.suffix != ".onnx":
        return False
    found = [(onnx_runtime(source, inputs), told) for _, inputs, told in cases]
    return any(outputs is not None and compare(outputs, told) is not None for outputs, told in found)


def _refusal(sentence: str) -> Verdict:
    """A refusal is an answer too, unless the compiler says of its own work that it is wrong."""
    if "imported network" in sentence and "differ" in sentence:
        return Verdict("import differs", sentence[:400])
    if "differs from its source" in sentence:
        return Verdict("check differs", sentence[:400])
    if "please report" in sentence or "Check failed" in sentence or "InternalError" in sentence:
        return Verdict("traceback", sentence[:400])
    return Verdict("refused", sentence[:400])


def _cases(network: Network, program: Program, batch: int | None) -> Iterator[Case]:
    """Inputs of several styles that rounding leaves clear, with what should be answered."""
    rng = Random(program.seed)
    dtype = program.options.get("dtype", "float32")
    for style in rng.choice(_STYLES):
        for _ in range(_TRIES):
            inputs = draw_inputs(network, rng, style, batch, program.options.get("special", False))
            try:
                told = answer(network, inputs, dtype)
            except (RuntimeError, IndexError, ValueError):  # PyTorch does not take this batch, or these integers
                told = None
            if told is not None:
                yield style, inputs, told
                break


def _options(program: Program) -> Options:
    known = ("threads", "conv", "numerics", "sparsity", "dtype")
    return Options(**{key: value for key, value in program.options.items() if key in known})


@lru_cache(maxsize=4)
def _host(opt_level: int | None) -> Any:
    """This machine, with LLVM's optimiser at that level."""
    target = load_target("host")
    return target if opt_level is None else target.model_copy(update={"tvm": {**target.tvm, "opt-level": opt_level}})


def _on_host(program: Program, imported: Imported, cases: list[Case], folder: Path, guard: Guard) -> Verdict:
    import tvm
    from tvm import relax

    target, options = _host(program.options.get("opt_level")), _options(program)
    built = dance_tvm.build_network(
        imported,
        folder / "artifact",
        target=target,
        threads=options.threads,
        check=program.options.get("check", False),
        options=options,
    )
    manifest = built.artifact.manifest
    kernels = [layer.kernel for layer in manifest.layers]
    names = [tensor.name for tensor in manifest.inputs]
    with dance_tvm.open_device("local") as device:
        plain = device.load(built.artifact)
        found = [list(plain.run(_named(names, inputs)).values()) for _, inputs, _ in cases]
        for (style, _, told), outputs in zip(cases, found, strict=True):
            if (wrong := compare(outputs, told)) is not None:
                return Verdict("wrong", wrong[1], kernels, style, wrong[0])
        library, arrays = for_virtual_machine(imported, target, options, folder)
        byte = [0]
        for poison in POISONS:
            byte[0] = poison
            with guard.on(poison):
                module = tvm.runtime.load_module(str(library))
                guard.guard_workspaces(library)
                machine = relax.VirtualMachine(module, tvm.cpu(), memory_cfg="naive")
                machine.set_instrument(poison_new_tensors(lambda: byte[0]))
                weights = [tvm.runtime.tensor(array) for array in arrays]
                again = []
                for _, inputs, _ in cases:
                    given = [tvm.runtime.tensor(tensor.contiguous().numpy()) for tensor in inputs]
                    results = machine["main"](*given, *weights)
                    flat = [results] if isinstance(results, tvm.runtime.Tensor) else list(results)
                    again.append([result.numpy() for result in flat])
                del module, machine, weights, given, results, flat
            for (style, _, _), clean, poisoned in zip(cases, found, again, strict=True):
                for index, (a, b) in enumerate(zip(clean, poisoned, strict=True)):
                    if not np.array_equal(a, b, equal_nan=True):
                        count = int((~((a == b) | (np.isnan(a) & np.isnan(b)))).sum())
                        told = f"output {index}: {count} of {a.size} values change with memory of 0x{poison:x}"
                        return Verdict("poison", told, kernels, style)
    if damage := guard.damaged():
        return Verdict("damage", f"{damage} bytes around buffers were written", kernels)
    return Verdict("right", "", kernels)


def _on_gpu(program: Program, imported: Imported, cases: list[Case]) -> Verdict:
    """The kernels of a network for a GPU, through OpenCL on this machine's processor."""
    from dance_tvm.compiler.pipeline import lower
    from dance_tvm.device.opencl import OpenCLSession
    from dance_tvm.device.opencl_network import OpenCLNetwork

    lowered = lower(imported.mod, load_target(program.options["target"]), _options(program))
    kernels = [layer.kernel for layer in lowered.layers]
    running = OpenCLNetwork(OpenCLSession(optimise=False, emulate_half=True), lowered)
    for style, inputs, told in cases:
        wrong = compare(running.run([tensor.numpy() for tensor in inputs]), told)
        if wrong is not None:
            return Verdict("wrong", wrong[1], kernels, style, wrong[0])
    return Verdict("right", "", kernels)


def _named(names: Sequence[str], inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}


def compare(found: Sequence[np.ndarray], told: Answer) -> tuple[float, str] | None:
    """How many times too large the difference is, and a sentence; None where all is within what rounding explains."""
    answers = zip(found, told.outputs, told.allowed, told.dtypes, strict=True)
    for index, (array, wanted, allowed, dtype) in enumerate(answers):
        want = wanted.double().numpy()
        if array.shape != want.shape:
            return float("inf"), f"output {index} has shape {array.shape}, not {want.shape}"
        if array.dtype != np.dtype(str(dtype).removeprefix("torch.")):
            return float("inf"), f"output {index} is of type {array.dtype}, not {dtype}"
        got = array.astype(np.float64)
        with np.errstate(invalid="ignore"):
            apart = np.asarray(np.abs(got - want))
        apart[(got == want) | (np.isnan(got) & np.isnan(want))] = 0.0
        apart[np.isnan(apart)] = np.inf
        worst = float(apart.max(initial=0.0))
        if worst > allowed:
            scale = peak(wanted)
            wrong = int((apart > allowed).sum())
            sentence = f"output {index}: {wrong} of {apart.size} values differ by up to {worst:.3g}"
            return worst / max(allowed, 1e-300), f"{sentence} of {scale:.3g} (allowed {allowed:.2g})"
    return None
