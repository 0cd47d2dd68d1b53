"""How much of what is wrong in generated code the build's check sees: mutants with one number changed.

    python -m benchmarks.mutants --count 200 --json benchmarks/results/mutants.json

In each mutant of four small networks one number of one kernel, or of one list of indices, is another one: a tap, a
bound, a stride, a factor, or a sum is a difference. A mutant counts if it changes an output on any of 50 inputs that
the check does not take by more than the check allows, or ends the process there; of those the check should refuse 99 %.
Mutants that TVM refuses to compile, or that change nothing, do not count. Each runs in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tvm
import tvm_ffi
import typer
from torch import nn
from tvm import relax, tirx

from dance_tvm import DanceError, Options, import_model
from dance_tvm.artifact.interface.dance_model import Model
from dance_tvm.artifact.linker import link_program
from dance_tvm.compiler.build import new_manifest
from dance_tvm.compiler.check import compare
from dance_tvm.compiler.check_inputs import CheckInputs, check_inputs
from dance_tvm.compiler.code import joined
from dance_tvm.compiler.kernels import compile_kernels
from dance_tvm.compiler.pipeline import lower
from dance_tvm.compiler.program import program_objects
from dance_tvm.core.agreement import TOLERANCE, allowed_of, difference
from dance_tvm.core.random_inputs import Kind, crossed_inputs, random_inputs
from dance_tvm.frontend.interface import Arrays, Imported
from dance_tvm.lowering.lower_windows import COUNTS
from dance_tvm.machines.target import load_target
from dance_tvm.sparsity.rt3d.pruning import prune_to_rate

OTHERS = 50
FIRST_SEED = 10_000  # of the other inputs, which the check's own do not reach
TIMEOUT_S = 120.0
LIST_SHARE = 0.2  # of the mutants: of lists known when compiled, the rest of kernels
DRAWS = 40  # of places in a kernel, until one gives code that compiles

NETWORKS = ("masks", "winograd", "mobile", "kernel groups")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Separable(nn.Module):
    """Convolutions over positions and over frames apart, with a residual: Winograd's and direct kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 16, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(16), nn.ReLU())
        self.across = nn.Sequential(nn.Conv3d(16, 24, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU())
        self.along = nn.Sequential(nn.Conv3d(24, 16, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(16))
        self.pool, self.score = nn.MaxPool3d(2), nn.Linear(16, 10)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        x = self.stem(clip)
        x = torch.relu(x + self.along(self.across(x)))
        return self.score(self.pool(x).mean((2, 3, 4)))


class Mobile(nn.Module):
    """A pointwise, a depthwise and another pointwise layer, squeeze and excitation, a norm of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Sequential(nn.Conv3d(3, 24, 1), nn.BatchNorm3d(24), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv3d(24, 24, 3, (1, 2, 2), 1, groups=24), nn.BatchNorm3d(24), nn.Hardswish()
        )
        self.squeeze, self.excite = nn.Linear(24, 8), nn.Linear(8, 24)
        self.narrow = nn.Sequential(nn.Conv3d(24, 12, 1), nn.GroupNorm(3, 12))
        self.score = nn.Linear(12, 10)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.widen(clip))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3, 4))))))
        x = self.narrow(x * gate[:, :, None, None, None])
        return self.score(torch.relu(x).mean((2, 3, 4)))


def _pruned() -> tuple[nn.Module, tuple[int, ...]]:
    """RT3D's kernel groups."""
    shape = (1, 3, 4, 16, 16)
    network = nn.Sequential(
        *(nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 10)),
    ).eval()
    prune_to_rate(network, [torch.randn(shape)], "kgs", 2.6)
    return network, shape


@dataclass
class Subject:
    """A network compiled kernel by kernel, its inputs, and what it answers to them."""

    name: str
    model: Any
    shape: tuple[int, ...] | None
    options: Options
    folder: Path
    imported: Imported = field(init=False)
    kernels: dict[str, tirx.PrimFunc] = field(init=False)
    planned: tvm.IRModule = field(init=False)
    objects: list[str] = field(init=False)
    names: dict[str, str] = field(init=False)
    tried: CheckInputs = field(init=False)
    others: list[Arrays] = field(init=False)
    expected: list[Arrays] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        example = None if self.shape is None else (torch.randn(self.shape),)
        self.imported = import_model(self.model, example_inputs=example)
        self.machine = load_target("host")
        self.target = self.machine.tvm_target(self.options.threads)
        self.lowered = lowered = lower(self.imported.mod, self.machine, self.options)
        self.manifest = new_manifest(self.imported, self.machine, self.options)
        mod = tvm.IRModule({var: func for var, func in lowered.mod.functions_items() if var.name_hint != COUNTS})
        with self.target:
            mod = relax.transform.DeadCodeElimination(["main"])(mod)
            self.planned = relax.get_pipeline("default_build")(mod)
        kernels = {var: func for var, func in self.planned.functions_items() if isinstance(func, tirx.PrimFunc)}
        self.kernels = {str(func.attrs["global_symbol"]): func for func in kernels.values()}
        self.objects, self.names = compile_kernels(tvm.IRModule(kernels), self.target, self.folder)
        self.tried = check_inputs(self.imported)
        self.others = list(_other_inputs(self.imported))

    @cached_property
    def lists(self) -> list[Any]:
        """The constants of whole numbers that ``main`` gives to kernels."""
        found: list[Any] = []

        def visit(node: Any) -> None:
            if isinstance(node, tvm.ir.GenericConst) and isinstance(node.value, tvm.runtime.Tensor):
                found.append(node)

        relax.analysis.post_order_visit(self.planned["main"], visit)
        return [node for node in found if node.value.numpy().dtype.kind == "i" and node.value.numpy().size]

    def library(self, planned: tvm.IRModule, changed: dict[str, tirx.PrimFunc], folder: Path) -> Path:
        """The library of ``planned`` with ``changed`` kernels."""
        names, objects = dict(self.names), list(self.objects)
        if changed:
            more, others = compile_kernels(tvm.IRModule(changed), self.target, folder)
            names, objects = {**names, **others}, [*objects, *(each for each in more if each not in objects)]
        code = joined(planned, objects, names, self.machine, folder)
        _, parts = program_objects(
            self.lowered, code, self.manifest, self.machine, self.options, folder, most_inline=sys.maxsize
        )
        link_program(folder / "model.so", parts, self.machine)
        return folder / "model.so"

    def runner(self, library: Path) -> Callable[[Arrays], Arrays]:
        """What answers as the library does."""
        model = Model(library.parent)

        def run(arrays: Arrays) -> Arrays:
            return model.run({name: np.ascontiguousarray(array) for name, array in arrays.items()})

        return run


def _other_inputs(imported: Imported) -> Iterable[Arrays]:
    """Inputs of all kinds and sizes, and crossings of them."""
    generator = np.random.default_rng(FIRST_SEED)
    made: list[Arrays] = []
    kinds: list[tuple[Kind, float]] = [
        ("normal", 1.0),
        ("varied", 1.0),
        ("picture", 1.0),
        ("varied", 0.1),
        ("varied", 10.0),
    ]
    for seed in range(OTHERS):
        if seed % 2 and len(made) > len(kinds):
            one, other = generator.choice(len(made), 2, replace=False)
            made.append(crossed_inputs(generator, made[one], made[other]))
        else:
            kind, scale = kinds[seed % len(kinds)]
            made.append(random_inputs(imported.inputs, FIRST_SEED + seed, kind, scale))
    return made


def subject_of(number: int, folder: Path) -> Subject:
    """The network of ``NETWORKS`` of that number, compiled in a folder within ``folder``."""
    torch.manual_seed(1)
    clip = (1, 3, 6, 20, 20)
    pruned, shape = _pruned()
    rows: list[tuple[Any, tuple[int, ...] | None, Options]] = [
        ("dance-c3d-mini", None, Options()),
        (_settled(Separable(), clip), clip, Options(conv="winograd")),
        (_settled(Mobile(), clip), clip, Options()),
        (pruned, shape, Options(conv="direct")),
    ]
    place = folder / str(number)
    place.mkdir()
    return Subject(NETWORKS[number], *rows[number], place)


def _settled(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """``network`` with statistics of its norms, in evaluation."""
    with torch.no_grad():
        for _ in range(4):
            network.train()(2 * torch.randn(shape) + 0.5)
    return network.eval()


# -- mutation ---------------------------------------------------------------------------------------------------------

_KINDS = (tirx.IntImm, tirx.FloatImm, tirx.Add, tirx.Sub)


def _changed(node: Any, generator: np.random.Generator) -> tuple[Any, str]:
    """Another number, or the other of sum and difference; and what was done."""
    if isinstance(node, tirx.IntImm):
        value = int(node.value) + int(generator.choice([-1, 1]))
        return tirx.IntImm(str(node.ty.dtype), value), f"{node.value} → {value}"
    if isinstance(node, tirx.FloatImm):
        real = float(node.value) * float(generator.choice([-1.0, 1.5])) if node.value else 1.0
        return tirx.FloatImm(str(node.ty.dtype), real), f"{node.value:g} → {real:g}"
    other = tirx.Sub if isinstance(node, tirx.Add) else tirx.Add
    return other(node.a, node.b), "+ → -" if other is tirx.Sub else "- → +"


def mutated(func: tirx.PrimFunc, generator: np.random.Generator) -> tuple[tirx.PrimFunc, str]:
    """``func`` with one place changed, and what was done there."""
    total = 0

    def count(node: Any) -> Any:
        nonlocal total
        total += not isinstance(node, tirx.IntImm) or str(node.ty.dtype) != "bool"
        return node

    tvm_ffi.structural_map(func.body, (_KINDS, count))
    wanted, seen, said = int(generator.integers(total)), 0, ""

    def change(node: Any) -> Any:
        nonlocal seen, said
        if isinstance(node, tirx.IntImm) and str(node.ty.dtype) == "bool":
            return node
        seen += 1
        if seen - 1 != wanted:
            return node
        new, said = _changed(node, generator)
        return new

    body = tvm_ffi.structural_map(func.body, (_KINDS, change))
    return func.with_body(body), said


@dataclass
class Mutant:
    """What became of one. ``outcome`` is refused (TVM does not compile it), same, caught or escaped."""

    network: str
    where: str
    change: str
    outcome: str = ""
    worst: float = 0.0
    said: str = ""


def _mutant(subject: Subject, seed: int, folder: Path) -> tuple[Mutant, Path | None]:
    """Draw a mutant and link it."""
    generator = np.random.default_rng(seed)
    if subject.lists and generator.uniform() < LIST_SHARE:
        node = subject.lists[generator.integers(len(subject.lists))]
        array = node.value.numpy().copy()
        place = int(generator.integers(array.size))
        before = int(array.flat[place])
        array.flat[place] = before + int(generator.choice([-1, 1]))
        new = relax.const(array)
        main = tvm_ffi.structural_map(
            subject.planned["main"], (tvm.ir.GenericConst, lambda each: new if each.same_as(node) else each)
        )
        told = Mutant(subject.name, f"list {array.shape}", f"[{place}] {before} → {array.flat[place]}")
        planned = tvm.IRModule(
            {**dict(subject.planned.functions_items()), subject.planned.get_global_var("main"): main}
        )
        return told, subject.library(planned, {}, folder)
    for _ in range(DRAWS):
        name = sorted(subject.kernels)[generator.integers(len(subject.kernels))]
        try:
            func, said = mutated(subject.kernels[name], generator)
            if tvm_ffi.structural_equal(func, subject.kernels[name]):
                continue
            return Mutant(subject.name, name, said), subject.library(subject.planned, {name: func}, folder)
        except Exception:
            continue
    return Mutant(subject.name, "", "", "refused"), None


# -- what the check says ----------------------------------------------------------------------------------------------


def _in_a_process(work: Callable[[Connection], None], timeout: float = TIMEOUT_S) -> tuple[list[Any], str]:
    """What ``work`` sends in a process of its own, and how that ended where it did not end well."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def fragile(sender: Connection) -> None:
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL):
            signal.signal(number, signal.SIG_DFL)  # a library's handler may let the process go on
        work(sender)

    process = context.Process(target=fragile, args=(sender,))
    process.start()
    sender.close()
    told: list[Any] = []
    ended = ""
    try:
        while True:
            if not receiver.poll(timeout):
                ended = "hangs"
                break
            told.append(receiver.recv())
    except EOFError:
        pass
    process.kill() if ended else process.join(timeout)
    process.join()
    return told, ended or (f"signal {-process.exitcode}" if process.exitcode and process.exitcode < 0 else "")


def expected_answers(subject: Subject) -> list[Arrays]:
    """What the network as it is answers to the other inputs."""

    def work(sender: Connection) -> None:
        run = subject.runner(subject.library(subject.planned, {}, subject.folder))
        for arrays in subject.others:
            sender.send(run(arrays))

    answers, ended = _in_a_process(work)
    if len(answers) != len(subject.others):
        raise DanceError(f"{subject.name} does not run as it is: {ended}")
    return answers


def _largest(found: Arrays, expected: Arrays) -> float:
    """How far outputs are apart, in shares of what is allowed."""
    return max(
        difference(found[name], array) / max(allowed_of(array, TOLERANCE), 1e-9) for name, array in expected.items()
    )


def judged(subject: Subject, seed: int) -> Mutant:
    """Draw a mutant, let the check look at it, and run it on the other inputs."""

    def work(sender: Connection) -> None:
        with tempfile.TemporaryDirectory() as folder:
            mutant, library = _mutant(subject, seed, Path(folder))
            sender.send(mutant)
            if library is None:
                return
            run = subject.runner(library)
            try:
                found = {name: run(arrays) for name, arrays in subject.tried.arrays.items()}
                compare(subject.manifest, subject.tried, found, "local")
                sender.send("passed")
            except Exception as error:
                sender.send(f"caught: {str(error).splitlines()[0][:120]}")
            worst = 0.0
            for arrays, expected in zip(subject.others, subject.expected, strict=True):
                try:
                    worst = max(worst, _largest(run(arrays), expected))
                except Exception:
                    worst = float("inf")
                sender.send(worst)

    told, ended = _in_a_process(work)
    mutant: Mutant = told[0] if told else Mutant(subject.name, "?", "?", "refused", said=ended)
    if mutant.outcome or not told:
        return mutant
    verdict = told[1] if len(told) > 1 else f"caught: {ended or 'it ends'}"
    mutant.said = f"{verdict} {ended}".strip()
    mutant.worst = max((value for value in told[2:]), default=float("inf"))
    if ended and len(told) < 2 + len(subject.others):
        mutant.worst = float("inf")
    if mutant.worst <= 1.0:
        mutant.outcome = "same"
    else:
        mutant.outcome = "caught" if verdict.startswith("caught") else "escaped"
    return mutant


@app.command()
def main(
    count: Annotated[int, typer.Option(help="Mutants in all.")] = 200,
    seed: int = 0,
    network: Annotated[str | None, typer.Option(help="Only this one.", show_default="all four")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the results.")] = None,
) -> None:
    """Mutate, check, and tell how many of the mutants that matter the check refused."""
    mutants: list[Mutant] = []
    with tempfile.TemporaryDirectory(prefix="dance_tvm_mutants_") as folder:
        chosen = [index for index, name in enumerate(NETWORKS) if network in (None, name)]
        if not chosen:
            raise DanceError(f"there is no network {network}: {', '.join(NETWORKS)}")
        for number in chosen:
            subject = subject_of(number, Path(folder))
            subject.expected = expected_answers(subject)
            for index in range(count // len(chosen)):
                mutant = judged(subject, 1_000_000 * number + 10_000 * seed + index)
                mutants.append(mutant)
                typer.echo(f"{mutant.network:<14}{mutant.outcome:<9}{mutant.where[:48]:<50}{mutant.change}", err=True)
    typer.echo(_table(mutants))
    if json_path is not None:
        facts = {"processor": platform.processor(), "seed": seed, "mutants": [asdict(mutant) for mutant in mutants]}
        json_path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _table(mutants: list[Mutant]) -> str:
    lines = ["network        mutants  refused  same  caught  escaped  share caught"]
    for name in [*dict.fromkeys(mutant.network for mutant in mutants), ""]:
        of = Counter(mutant.outcome for mutant in mutants if name in ("", mutant.network))
        matter = of["caught"] + of["escaped"]
        share = f"{of['caught'] / matter:.1%}" if matter else "-"
        lines.append(
            f"{name or 'all':<15}{sum(of.values()):>7}{of['refused']:>9}{of['same']:>6}{of['caught']:>8}"
            f"{of['escaped']:>9}{share:>14}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app()
