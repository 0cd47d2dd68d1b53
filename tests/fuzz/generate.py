"""From a seed to a program: shapes, steps that fit them, outputs and options."""

from __future__ import annotations

import math
from random import Random
from typing import Any

from torch import Tensor

from . import blocks, masks, papers  # noqa: F401 - they register their operators
from .operators import OPERATORS, Draft, join
from .program import Program, Step, Writer

_LARGEST = 4000  # elements of any value
_GPU_SHARE = 0.03
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
    if rng.random() < 0.1:
        program.inputs.append(list(program.inputs[0]))
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


def _shape(rng: Random) -> tuple[int, ...]:
    rank = rng.choice((1, 2, 2, 3, 3, 3, 3, 3))
    batch, channels = rng.choice((1, 1, 1, 2, 3)), rng.choice((1, 2, 3, 3, 4, 5, 6, 8, 8, 12, 16, 17))
    extents = [rng.choice((3, 4, 5, 6, 7, 8, 9, 12)) for _ in range(rank)]
    if rank == 3:
        extents[0] = rng.choice((1, 2, 3, 4, 4, 5))
    if rng.random() < 0.2:
        extents[rng.randrange(rank)] = channels  # axes of one length mislead what tells them by it
    while batch * channels * math.prod(extents) > _LARGEST // 2:
        extents[extents.index(max(extents))] //= 2
    return batch, channels, *(max(1, extent) for extent in extents)


def _step(rng: Random, writer: Writer) -> Step | None:
    """One step on the last value, now and then on an earlier one, or on two."""
    last = len(writer.names) - 1
    source = last if rng.random() < 0.85 else rng.randrange(last + 1)
    shapes = [tuple(writer.values[name].shape) for name in writer.names]
    if last > 0 and rng.random() < 0.12:
        other = rng.randrange(last)
        return _placed("join", join(rng, shapes[last], shapes[other]), [last, other])
    names = list(OPERATORS)
    name = rng.choices(names, [OPERATORS[name][0] for name in names])[0]
    return _placed(name, OPERATORS[name][1](rng, shapes[source]), [source])


def _placed(name: str, draft: Draft | None, sources: list[int]) -> Step | None:
    return draft and Step(name, sources, draft.body, draft.init, draft.mask)


def _fits(writer: Writer, step: Step) -> bool:
    """Whether PyTorch takes the step, and its result is one to go on with; the writer then holds it."""
    before = len(writer.names), len(writer.init), len(writer.body)
    try:
        value = writer.add(step)
        good = isinstance(value, Tensor) and value.is_floating_point() and 0 < value.numel() <= _LARGEST
        good = good and bool(value.isfinite().all()) and float(value.abs().max()) < 1e4
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
    if rng.random() < _GPU_SHARE:
        options["target"], options["dtype"] = rng.choice(GPU_TARGETS)
    elif rng.random() < 0.05:
        options["check"] = True
    return options
