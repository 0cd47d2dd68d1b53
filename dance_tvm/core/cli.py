"""The ``dance-tvm`` command: a table of commands, each a module of its own that is imported only when called."""

from __future__ import annotations

import gc
import importlib
import os
import platform
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NoReturn

import typer

from dance_tvm.core.command_line import Command, Group
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.files import DISK_FULL
from dance_tvm.core.interrupts import INTERRUPTED, is_unhandled
from dance_tvm.core.verbosity import Quiet, Verbose, level, set_level, with_verbosity

BAD_INPUT = 2
#: Exit code of a program whose output is no longer read, as behind `head`.
NOT_READ = 128 + signal.SIGPIPE

# name: (module, what it does). A module offers ``app``, a typer.Typer; one that is not there is not listed.
COMMANDS = {
    "build": ("dance_tvm.build", "Compile a trained network into a verified artifact."),
    "export": ("dance_tvm.export", "Write a PyTorch network as a file that builds take."),
    "pack": ("dance_tvm.pack", "Package an artifact as a C folder, an Android module, or a wheel."),
    "run": ("dance_tvm.run", "Run an artifact on a device: arrays in, arrays out."),
    "targets": ("dance_tvm.show_targets", "List the machines that networks can be built for."),
    "units": ("dance_tvm.units", "Show in which units the kernels of a network can skip work."),
    "train": ("dance_tvm.train", "Train or prune a sparse network."),
    "export-dstep": ("dance_tvm.export_dstep", "Write a trained D-STEP network, by clip or by frame, for a build."),
    "tune": ("dance_tvm.tune", "Search for the fastest kernels for a network on a real device."),
    "groups": ("dance_tvm.groups", "Measure which kernel groups a device runs fastest."),
    "logs": ("dance_tvm.logs", "Check, merge and show tuning logs."),
    "bench": ("dance_tvm.bench", "Time an artifact on a device, by clip and by layer."),
    "report": ("dance_tvm.report", "Turn measurements into a page to look at."),
    "show": ("dance_tvm.show", "Show what an artifact is: interface, layers, sizes, check, versions."),
    "stream": ("dance_tvm.stream", "Run a streaming artifact frame by frame."),
    "device": ("dance_tvm.devices", "List and watch the devices of a tracker."),
    "cache": ("dance_tvm.cache", "List or clear the downloads and compiled kernels kept for this user."),
    "doctor": ("dance_tvm.doctor", "Report what works on this machine, and what fixes the rest."),
    "completion": ("dance_tvm.completion", "Print a shell's completion script."),
}


def main() -> NoReturn:
    """Entry point of the console script."""
    start(_table_of_commands(), "dance-tvm")


class Application(typer.Typer):
    """Commands that all take -v and -q."""

    def command(self, *args: Any, **options: Any) -> Callable[..., Any]:
        register = super().command(*args, cls=Command, **options)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(with_verbosity(function))
            return function

        return decorate


def application(**options: Any) -> Application:
    """What a command's module offers as ``app``: ``start`` reports its errors, so typer leaves them alone."""
    return Application(cls=Group, add_completion=False, pretty_exceptions_enable=False, **options)


def examples(*lines: str) -> str:
    """What a command's help ends with: lines to copy."""
    return "\n\n".join(["Examples:", *lines])


def start(app: typer.Typer, name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a command to its end: bad input is one sentence and exit code 2, Ctrl-C is exit code 130.

    Where our own warnings come from in the code is left out of what is printed, and so is all of them with -q.
    """
    located = warnings.formatwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any, **context: Any) -> str:
        own = issubclass(category, DanceWarning)
        if own and level() < 0:
            return ""
        return f"warning: {message}\n" if own else located(message, category, *where, **context)

    warnings.formatwarning = shown
    try:
        with plain_errors():
            require_linux(sys.argv[1:] if arguments is None else arguments)
            app(args=arguments, prog_name=name)
    finally:
        gc.freeze()  # else Python looks through all of TVM and PyTorch as it ends, which takes seconds
    sys.exit(0)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what the user can mend into one sentence and an exit code, and a request to end into a clean unwinding."""
    asked_to_end = 0  # the exit code, once a signal has asked

    def interrupt(_number: int, _frame: Any) -> NoReturn:
        nonlocal asked_to_end
        asked_to_end = INTERRUPTED
        raise KeyboardInterrupt

    def terminate(number: int, _frame: Any) -> NoReturn:
        nonlocal asked_to_end
        asked_to_end = 128 + number
        sys.exit(asked_to_end)

    previous = signal.signal(signal.SIGTERM, terminate)
    at_ctrl_c = signal.getsignal(signal.SIGINT)
    if is_unhandled():
        signal.signal(signal.SIGINT, interrupt)
    output = _output()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _end_unread()
    except DanceError as error:
        _end(asked_to_end or BAD_INPUT, str(error))
    except KeyboardInterrupt:
        _end(INTERRUPTED)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # how typer ends on Ctrl-C, without a word
            _end(INTERRUPTED)
        if not _is_read(output):
            _end_unread()
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _fail(f"no space left on the disk ({error.filename or 'writing'}): free some and try again", BAD_INPUT)
    except Exception:
        if asked_to_end:  # a library gives what a signal raised back as an error of its own
            _end(asked_to_end)
        raise
    finally:
        signal.signal(signal.SIGINT, at_ctrl_c)
        signal.signal(signal.SIGTERM, previous)


def require_linux(arguments: list[str]) -> None:
    """Raise DanceError on a system that this compiler does not run on, except where only help is asked for."""
    system = platform.system()
    if system != "Linux" and not {"--help", "--version"} & set(arguments):
        instead = {"Windows": "use WSL 2", "Darwin": "use a Linux container or virtual machine"}
        raise DanceError(f"dance-tvm runs on Linux, not on {system}: {instead.get(system, 'use a Linux machine')}")


def _end(code: int, sentence: str = "") -> NoReturn:
    """End with what is wrong, or as a signal has asked, whatever was wrong then."""
    if code not in (BAD_INPUT, INTERRUPTED):
        sys.exit(code)
    _fail("interrupted" if code == INTERRUPTED else sentence, code)


def _fail(sentence: str, code: int) -> NoReturn:
    if code == INTERRUPTED:
        exec("")  # Python remembers an interrupt within an exec until the next one, and would end by the signal
    if level() > 1 and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)


def _output() -> tuple[int, int] | None:
    """What standard output is: a terminal, a file, a pipe."""
    try:
        status = os.fstat(1)
    except OSError:  # closed
        return None
    return status.st_dev, status.st_ino


def _is_read(output: tuple[int, int] | None) -> bool:
    """Whether all that was printed to ``output`` could be: where not, typer wraps what it prints to, and rich leads it
    nowhere."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    return type(sys.stdout).__name__ != "PacifyFlushWrapper" and _output() == output


def _end_unread() -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print goes nowhere when Python ends
    sys.exit(NOT_READ)


def _table_of_commands() -> typer.Typer:
    summary = "Trained, sparse 3D CNNs compiled to small, fast, verified artifacts."
    # Not ours: what stands behind a command's name, -v and -q too, is for the command itself.
    app = typer.Typer(
        cls=Group, add_completion=False, pretty_exceptions_enable=False, help=summary, no_args_is_help=True
    )
    app.callback()(_options)
    # Every word after the command's name is the command's own, --help too.
    context = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    for name, (module, summary) in COMMANDS.items():
        if find_spec(module) is not None:
            app.command(name, help=summary, context_settings=context, add_help_option=False)(_forward(name, module))
    return app


def _forward(name: str, module: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        importlib.import_module(module).app(args=context.args, prog_name=f"dance-tvm {name}")

    return command


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"dance-tvm {version('dance-tvm')}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and end.", is_eager=True, callback=_print_version
    ),
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Options before a command's name."""
    set_level(verbose, quiet)


if __name__ == "__main__":
    main()
