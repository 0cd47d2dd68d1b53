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
from dance_tvm.machines.target import load_target

from .machine import for_virtual_machine
from .memory import POISONS, Guard, poison_new_tensors
from .oracle import Answer, answer, draw_inputs
from .program import Network, Program, write_out

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
    cases = list(_cases(network, program))
    if not cases:
        return Verdict("unclear")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        if program.options.get("target", "host") == "host":
            return _on_host(program, network, cases, folder, guard)
        return _on_gpu(program, network, cases)
    except DanceError as error:
        return _refusal(str(error))
    except Exception as error:
        last = traceback.format_exc().strip().splitlines()
        return Verdict("traceback", f"{type(error).__name__}: {str(error)[:300]} | {' '.join(last[-4:])[:400]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refusal(sentence: str) -> Verdict:
    """A refusal is an answer too, unless the compiler says of its own work that it is wrong."""
    if "imported network" in sentence and "differ" in sentence:
        return Verdict("import differs", sentence[:400])
    if "differs from its source" in sentence:
        return Verdict("check differs", sentence[:400])
    if "please report" in sentence or "Check failed" in sentence or "InternalError" in sentence:
        return Verdict("traceback", sentence[:400])
    return Verdict("refused", sentence[:400])


Case = tuple[str, list[Tensor], Answer]


def _cases(network: Network, program: Program) -> Iterator[Case]:
    """Inputs of several styles that rounding leaves clear, with what should be answered."""
    rng = Random(program.seed)
    dtype = program.options.get("dtype", "float32")
    for style in rng.choice(_STYLES):
        for _ in range(_TRIES):
            inputs = draw_inputs(network, rng, style)
            told = answer(network, inputs, dtype)
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


def _on_host(program: Program, network: Network, cases: list[Case], folder: Path, guard: Guard) -> Verdict:
    import tvm
    from tvm import relax

    target, options = _host(program.options.get("opt_level")), _options(program)
    example = tuple(cases[0][1])
    built = dance_tvm.build_network(
        network.module,
        folder / "artifact",
        example_inputs=example,
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
        library, arrays = for_virtual_machine(network.module, example, target, options, folder)
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
                    given = [tvm.runtime.tensor(np.ascontiguousarray(tensor.numpy())) for tensor in inputs]
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


def _on_gpu(program: Program, network: Network, cases: list[Case]) -> Verdict:
    """The kernels of a network for a GPU, through OpenCL on this machine's processor."""
    from dance_tvm.compiler.pipeline import lower
    from dance_tvm.device.opencl import OpenCLSession
    from dance_tvm.device.opencl_network import OpenCLNetwork

    imported = dance_tvm.import_model(network.module, example_inputs=tuple(cases[0][1]))
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
    for index, (array, wanted, allowed) in enumerate(zip(found, told.outputs, told.allowed, strict=True)):
        want = wanted.double().numpy()
        if array.shape != want.shape:
            return float("inf"), f"output {index} has shape {array.shape}, not {want.shape}"
        apart = np.abs(array.astype(np.float64) - want)
        apart[np.isnan(apart)] = np.inf
        worst = float(apart.max(initial=0.0))
        if worst > allowed:
            scale = float(np.abs(want).max())
            wrong = int((apart > allowed).sum())
            sentence = f"output {index}: {wrong} of {apart.size} values differ by up to {worst:.3g}"
            return worst / max(allowed, 1e-300), f"{sentence} of {scale:.3g} (allowed {allowed:.2g})"
    return None
