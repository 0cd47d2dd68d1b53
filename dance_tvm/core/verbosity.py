"""How much a command says besides its result: ``-q`` only errors, ``-v`` the time of each phase, ``-vv`` tracebacks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from dance_tvm.core.errors import DanceError

#: -1: quiet, 0: as usual, 1 and 2: more.
_level = 0

Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, show_default=False, help="Print the time of each phase; -vv: tracebacks too."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result and errors.")]


def level() -> int:
    """How much is to be said: -1 to 2."""
    return _level


def set_level(verbose: int, quiet: bool) -> None:
    """Take over what the command line asks for; words before and after the command's name add up."""
    global _level
    if quiet and verbose:
        raise DanceError("-q says less and -v more: give one of them")
    if quiet:
        _level = -1
    elif verbose:
        _level = min(2, max(_level, 0) + verbose)
    wanted = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}[_level]
    logging.getLogger("dance_tvm").setLevel(wanted)


def with_verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` with the options -v and -q, which it need not know."""

    @wraps(command)
    def wrapped(*args: Any, verbose: int = 0, quiet: bool = False, **kwargs: Any) -> Any:
        set_level(verbose, quiet)
        if kwargs.get("as_json") and kwargs.get("json_lines"):
            raise DanceError("give --json (the result as one object) or --json-lines (one object per line), not both")
        return command(*args, **kwargs)

    signature = inspect.signature(command, eval_str=True)
    more = {"verbose": (Verbose, 0), "quiet": (Quiet, False)}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in more.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # functions have one
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped
