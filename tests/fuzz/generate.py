"""From a seed to a program: shapes, steps that fit them, outputs and options."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from . import blocks, masks, papers  # noqa: F401 - they register their operators
from .operators import OPERATORS, Draft, join
from .program import Program, Step, Writer
from .sources import draw_source
from .typed import DTYPES, mixed, typed_step

_LARGEST = 4000  # elements of any value
_GPU_SHARE = 0.03
#: Operators that skip nothing: what they read is all that PyTorch reads.
_PLAIN = [
    name
    for name in OPERATORS
    if "mask" not in name and name not in ("pruned_convolution", "reparametrised_convolution")
]
GPU_TARGETS = (
    ("opencl", "float32"),
    ("jetson-nano", "float16"),
    ("snapdragon-gpu", "float16"),
    ("jetson-nano", "float32"),
)


def generate(seed: int) -> Program:
    """The program of ``seed``, the same in every process."""
    rng = Random(seed)
    if rng.random() < papers.SHARE:
        return papers.whole_network(rng, seed, _options(rng))
    program = Program(seed, [list(_shape(rng))], options=_options(rng))
    if "open" in program.options:
        program.inputs[0][0] = 2
    if rng.random() < 0.1:
        program.inputs.append(list(program.inputs[0]))
    if rng.random() < 0.25:
        _more_types(rng, program)
    writer = Writer(program)
    wanted = len(program.inputs) + rng.choice((2, 2, 3, 3, 3, 4, 4, 5, 6))
    for _ in range(60):
        if len(writer.names) >= wanted:
            break
        step = _step(rng, writer)
        if step and _fits(writer, step):
            program.steps.append(step)
    program.outputs = _outputs(rng, len(writer.names))
    return program


def _more_types(rng: Random, program: Program) -> None:
    """Another type for the first input, or a second one of another type: a scalar, of its shape or of part of it."""
    first = program.inputs[0]
    if rng.random() < 0.4:
        program.dtypes = [rng.choice(DTYPES)]
    else:
        part = [extent if rng.random() < 0.6 else 1 for extent in first]
        program.inputs[1:] = [rng.choice(([], [1], list(first), part, part))]
        program.dtypes = ["float32", rng.choice((*DTYPES, "float32"))]


def _shape(rng: Random) -> tuple[int, ...]:
    rank = rng.choice((1, 2, 2, 3, 3, 3, 3, 3))
    batch, channels = rng.choice((1, 1, 1, 2, 3)), rng.choice((1, 2, 3, 3, 4, 5, 6, 8, 8, 12, 16, 17))
    extents = [rng.choice((3, 4, 5, 6, 7, 8, 9, 12)) for _ in range(rank)]
    if rank == 3:
        extents[0] = rng.choice((1, 2, 3, 4, 4, 5))
    if rng.random() < 0.2:
        extents[rng.randrange(rank)] = channels  # axes of one length mislead what tells them by it
    if rng.random() < 0.1:
        extents[rng.randrange(rank)] = 1
    while batch * channels * math.prod(extents) > _LARGEST // 2:
        extents[extents.index(max(extents))] //= 2
    return batch, channels, *(max(1, extent) for extent in extents)


def _step(rng: Random, writer: Writer) -> Step | None:
    """One step on the last value, now and then on an earlier one, or on two."""
    last = len(writer.names) - 1
    source = last if rng.random() < 0.85 else rng.randrange(last + 1)
    values = [writer.values[name] for name in writer.names]
    shapes = [tuple(value.shape) for value in values]
    plain = [value.dtype == torch.float32 and value.dim() > 0 for value in values]
    if last > 0 and rng.random() < (0.12 if all(plain) else 0.4):
        other = rng.randrange(last)
        both = join(rng, shapes[last], shapes[other]) if plain[last] and plain[other] else None
        return _placed("join", both or mixed(rng, values[last], values[other]), [last, other])
    if not plain[source]:
        return _placed("typed", typed_step(rng, shapes[source], values[source].dtype), [source])
    names = list(_PLAIN if writer.special else OPERATORS)
    name = rng.choices(names, [OPERATORS[name][0] for name in names])[0]
    return _placed(name, OPERATORS[name][1](rng, shapes[source]), [source])


def _placed(name: str, draft: Draft | None, sources: list[int]) -> Step | None:
    return draft and Step(name, sources, draft.body, draft.init, draft.mask)


def _fits(writer: Writer, step: Step) -> bool:
    """Whether PyTorch takes the step, and its result is one to go on with; the writer then holds it."""
    before = len(writer.names), len(writer.init), len(writer.body)
    try:
        value = writer.add(step)
        good = isinstance(value, Tensor) and value.numel() <= _LARGEST and not value.is_complex()
        good = (
            good and bool(value.isfinite().all()) and float(value.double().abs().amax() if value.numel() else 0) < 1e4
        )
    except (RuntimeError, ValueError, IndexError, NotImplementedError, AssertionError, TypeError):
        good = False
    if not good:
        for name in [*writer.names[before[0] :], f"m{before[0]}"]:
            writer.values.pop(name, None)
            writer.shapes.pop(name, None)
            writer.masks.discard(name)
        del writer.names[before[0] :], writer.init[before[1] :], writer.body[before[2] :]
    return good


def _outputs(rng: Random, count: int) -> list[int]:
    outputs = [count - 1]
    if count > 2 and rng.random() < 0.25:
        outputs.append(rng.randrange(1, count - 1))
    if rng.random() < 0.05:
        outputs.append(rng.randrange(count))  # an input as it is, or an output twice
    return outputs


def _options(rng: Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "threads": rng.choice((1, 1, 2)),
        "conv": rng.choice(("auto", "auto", "auto", "direct", "winograd")),
        "numerics": rng.choice(("fast", "fast", "fast", "exact")),
        "sparsity": rng.choice(("auto", "auto", "auto", "auto", "off")),
    }
    if rng.random() < 0.8:
        options["opt_level"] = 0  # LLVM's time is a third of a build's; some programs get its optimiser all the same
    options |= draw_source(rng)
    if rng.random() < 0.06:
        options |= {"special": True, "conv": "direct", "sparsity": "off"}  # what else loses NaN is in docs/kernels.md
    if rng.random() < _GPU_SHARE:
        options["target"], options["dtype"] = rng.choice(GPU_TARGETS)
    elif rng.random() < 0.05:
        options["check"] = True
    return options
