"""How a command line is read: what is wrong with it is one sentence, as all bad input is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from shutil import get_terminal_size
from typing import Any

from pydantic import ValidationError
from typer.core import TyperCommand, TyperGroup

from dance_tvm.core.errors import DanceError
from dance_tvm.core.faults import said_of

#: No option takes a larger whole number: the libraries that most of them reach hold 32 bits.
LARGEST = 2**31 - 1

#: Columns of a terminal from which help stands in frames.
FRAMED_FROM = 100


class Command(TyperCommand):
    """A command; an option that takes one value is given once, and numbers are finite."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _told(ctx):
            _require_once(self, ctx, args)
            rest = super().parse_args(ctx, args)
        for parameter in self.get_params(ctx):
            _require_sensible(parameter.opts[0], ctx.params.get(str(parameter.name)))
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _make_room(self, ctx)
        super().format_help(ctx, formatter)


class Group(TyperGroup):
    """A command of several."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _make_room(self, ctx)
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _told(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        with _told(ctx):
            return super().resolve_command(ctx, args)


@contextmanager
def _told(context: Any) -> Iterator[None]:
    """Turn typer's errors about words of the command line into DanceErrors; help, which it raises too, passes."""
    try:
        yield
    except Exception as problem:
        shown = getattr(problem, "format_message", None)
        if shown is None or type(problem).__name__ == "NoArgsIsHelpError":
            raise
        raise DanceError(_sentence(problem, shown(), context.command_path)) from problem


def _sentence(problem: Exception, message: str, command: str) -> str:
    fault = problem.__cause__
    if isinstance(fault, ValidationError):
        return f"{_named(problem)} {said_of(fault.errors()[0]).rstrip('.')}"
    if option := getattr(problem, "option_name", "") if hasattr(problem, "possibilities") else "":
        near = " or ".join(getattr(problem, "possibilities", None) or [])
        message = f"there is no option {option}{f', did you mean {near}?' if near else ''}"
    return f"{message[:1].lower()}{message[1:].rstrip('.')}: `{command} --help` shows what there is"


def _named(problem: Any) -> str:
    return str(problem.param.opts[0]) if problem.param.param_type_name == "option" else str(problem.param.name).upper()


def _make_room(command: Any, context: Any) -> None:
    """Let help say what an option takes in few words: nothing of those that take no value, and of those that may be
    repeated what each takes; and let it stand without frames where these would cut words."""
    if get_terminal_size().columns < FRAMED_FROM:
        command.rich_markup_mode = None
        command.epilog = "\b\n" + (command.epilog or "").replace("\n\n", "\n  ")  # \b: lines are kept as they are
        for each in getattr(command, "commands", {}).values():
            each.short_help = each.short_help or (each.help or "").partition("\n\n")[0]  # which is not shortened
    for parameter in command.get_params(context):
        if parameter.param_type_name == "option" and parameter.metavar is None:
            takes = "" if parameter.is_flag or parameter.count else parameter.display_type(context) or ""
            parameter.metavar = re.sub(r"list\[(\w+)\]", r"\1", takes).replace(" range", "").replace("Path", "path")


def _require_once(command: Any, context: Any, args: Sequence[str]) -> None:
    """Raise DanceError where an option that takes one value is given two that differ."""
    parser = command.make_parser(context)
    single = []
    for parameter in command.get_params(context):
        if parameter.param_type_name == "option" and not (parameter.multiple or parameter.count):
            collecting = copy(parameter)
            collecting.multiple = True
            collecting.add_to_parser(parser, context)  # in the place of the one that keeps the last
            single.append(parameter)
    given, _, _ = parser.parse_args(list(args))
    for parameter in single:
        values = list(dict.fromkeys(given.get(str(parameter.name)) or []))
        if len(values) > 1 and parameter.secondary_opts:
            raise DanceError(f"{parameter.opts[0]} and {parameter.secondary_opts[0]} are both given: give one of them")
        if len(values) > 1:
            raise DanceError(f"{parameter.opts[0]} is given twice, as {values[0]} and as {values[1]}: give it once")


def _require_sensible(option: str, value: object) -> None:
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise DanceError(f"{option} must be a finite number, not {number}")
        if isinstance(number, int) and abs(number) > LARGEST:
            raise DanceError(f"{option} must be at most {LARGEST:,}, not {number}")
