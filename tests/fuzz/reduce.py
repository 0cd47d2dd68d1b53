"""A failing program made smaller while it fails in the same way: fewer steps, outputs and options, smaller numbers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from .program import Program, Step, write_out
from .trial import Verdict

Try = Callable[[Program], "tuple[Verdict, float]"]
_SECONDS = 180
_DEFAULTS = {"threads": 1, "conv": "auto", "numerics": "fast", "sparsity": "auto"}


def reduce(program: Program, verdict: Verdict, try_it: Try, seconds: float = _SECONDS) -> tuple[Program, Verdict]:
    """The smallest program found in ``seconds`` that fails as ``program`` does, and how it fails."""
    end = time.monotonic() + seconds
    changed = True
    while changed:
        changed = False
        for candidate in _smaller(program):
            if time.monotonic() > end:
                return program, verdict
            if not _makes_sense(candidate):
                continue
            found, _ = try_it(candidate)
            if _alike(found, verdict):
                program, verdict, changed = candidate, found, True
                break
    return program, verdict


def _alike(found: Verdict, verdict: Verdict) -> bool:
    """Of the same kind; of tracebacks and crashes, with the same beginning."""
    if found.kind != verdict.kind:
        return False
    return found.kind not in ("traceback", "crash") or found.told.split(":")[0] == verdict.told.split(":")[0]


def _makes_sense(program: Program) -> bool:
    try:
        write_out(program)
    except Exception:
        return False
    return True


def _smaller(program: Program) -> Iterator[Program]:
    """Candidates, those that take most away first."""
    yield from _without_steps(program)
    if len(program.outputs) > 1:
        for output in program.outputs:
            yield replace(program, outputs=[output])
    for key, value in program.options.items():
        if key in _DEFAULTS and value != _DEFAULTS[key]:
            yield replace(program, options={**program.options, key: _DEFAULTS[key]})
        elif key not in _DEFAULTS:
            yield replace(program, options={k: v for k, v in program.options.items() if k != key})
    for index, dtype in enumerate(program.dtypes):
        if dtype != "float32":
            yield replace(program, dtypes=[*program.dtypes[:index], "float32", *program.dtypes[index + 1 :]])
    yield from _with_fewer_lines(program)
    yield from _with_smaller_inputs(program)
    yield from _with_smaller_numbers(program)


def _without_steps(program: Program) -> Iterator[Program]:
    """Without what comes after a value, and without one step whose users read its source instead."""
    count = len(program.inputs)
    for last in range(count, count + len(program.steps) - 1):
        yield _pruned(replace(program, steps=program.steps[: last - count + 1], outputs=[last]))
    for index, dropped in enumerate(program.steps):
        for source in dict.fromkeys(dropped.sources):
            gone = index + count

            def moved(value: int, gone: int = gone, source: int = source) -> int:
                return source if value == gone else value - (value > gone)

            steps = [
                replace(step, sources=[moved(value) for value in step.sources])
                for step in program.steps
                if step is not dropped
            ]
            outputs = [moved(value) for value in program.outputs]
            if steps and min(outputs) >= count:
                yield _pruned(replace(program, steps=steps, outputs=outputs))


def _pruned(program: Program) -> Program:
    """Without the steps that no output reads."""
    count = len(program.inputs)
    needed = set(program.outputs)
    for index in reversed(range(len(program.steps))):
        if index + count in needed:
            needed.update(program.steps[index].sources)
    kept = [value for value in range(count + len(program.steps)) if value < count or value in needed]
    number = {value: place for place, value in enumerate(kept)}
    steps = [
        replace(
            program.steps[value - count], sources=[number[source] for source in program.steps[value - count].sources]
        )
        for value in kept[count:]
    ]
    return replace(program, steps=steps, outputs=[number[output] for output in program.outputs])


def _with_step(program: Program, index: int, step: Step) -> Program:
    return replace(program, steps=[*program.steps[:index], step, *program.steps[index + 1 :]])


def _with_fewer_lines(program: Program) -> Iterator[Program]:
    for index, step in enumerate(program.steps):
        for line in range(len(step.body) - 1):
            yield _with_step(program, index, replace(step, body=step.body[:line] + step.body[line + 1 :]))
        if len(step.body) > 1 and step.body[-1] != "{y} = a":
            yield _with_step(program, index, replace(step, body=[*step.body[:-1], "{y} = a"]))


def _with_smaller_inputs(program: Program) -> Iterator[Program]:
    for which, shape in enumerate(program.inputs):
        for axis, extent in enumerate(shape):
            for smaller in dict.fromkeys((1, extent // 2, extent - 1)):
                if 0 < smaller < extent:
                    shapes = [list(other) for other in program.inputs]
                    for other in shapes:
                        if other == list(shape) or other is shapes[which]:
                            other[axis] = smaller
                    steps = [
                        replace(
                            step, mask=[smaller if a == axis and n == extent else n for a, n in enumerate(step.mask)]
                        )
                        if step.mask
                        else step
                        for step in program.steps
                    ]
                    yield replace(program, inputs=shapes, steps=steps)


def _with_smaller_numbers(program: Program) -> Iterator[Program]:
    """One number of a layer at a time, and one word less: biases, groups, dilations."""
    for index, step in enumerate(program.steps):
        for part in ("init", "body"):
            lines = getattr(step, part)
            for place, line in enumerate(lines):
                for smaller in _shorter_lines(line):
                    new = [*lines[:place], smaller, *lines[place + 1 :]]
                    yield _with_step(program, index, replace(step, **{part: new}))


def _shorter_lines(line: str) -> Iterator[str]:
    for word in re.finditer(r", (groups|dilation|bias|padding_mode|stride|ceil_mode)=(\([^)]*\)|[^,()]+)", line):
        yield line[: word.start()] + line[word.end() :]
    for word in re.finditer(r"(?<![\w.{])\d+(?![\w.}])", line):
        value = int(word.group())
        for smaller in dict.fromkeys((1, value // 2)):
            if 0 < smaller < value:
                yield line[: word.start()] + str(smaller) + line[word.end() :]
