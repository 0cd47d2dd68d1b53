"""The command line: quick help, one sentence for bad input, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import typer

from dance_tvm.core.cli import COMMANDS, _table_of_commands, plain_errors, start
from dance_tvm.core.errors import DanceError, unexpected_told


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "dance_tvm.core.cli", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_help_is_quick_and_lists_the_commands():
    done = command("--help")
    assert done.returncode == 0
    assert {"build", "run", "targets"} <= set(done.stdout.split())
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dance_tvm.core.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    ).stderr
    assert "| tvm" not in loaded
    assert "| torch" not in loaded


def test_every_command_there_is_has_help():
    for name, (module, summary) in COMMANDS.items():
        if name in command("--help").stdout.split():
            done = command(name, "--help")
            assert done.returncode == 0, (name, module, done.stderr)
            assert f"dance-tvm {name}" in done.stdout
            assert summary


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["targts"], "targets"),
        (["targets", "--colour"], "--colour"),
        (["build", "--threads", "0"], "threads"),
        (["build", "--conv", "magic"], "magic"),
        (["run"], "artifact"),
        (["build", "--target", "snapdragn"], "did you mean 'snapdragon'"),
        (["run", "/nowhere"], "there is no artifact /nowhere"),
    ],
)
def test_wrong_words_end_with_2_and_no_traceback(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2, done
    assert said in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_targets_as_json_has_every_fact():
    facts = {target["name"]: target for target in json.loads(command("targets", "--json").stdout)}
    assert facts["snapdragon"]["clusters"][0]["mcpu"] == "cortex-x2"
    assert len(facts["snapdragon"]["fingerprint"]) == 16


def test_a_warning_of_ours_is_one_line():
    program = """
import typer, warnings
from dance_tvm.core.cli import start
from dance_tvm.core.errors import DanceWarning
app = typer.Typer(add_completion=False)
@app.command()
def main():
    warnings.warn("figures may mislead: give --clips", DanceWarning)
    warnings.warn("a library's own")
start(app, "tried")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stderr.splitlines()
    assert first == "warning: figures may mislead: give --clips"
    assert second.endswith("UserWarning: a library's own")


@pytest.mark.parametrize("module", ["dance_tvm.build", "dance_tvm.run"])
def test_a_command_is_also_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert f"python -m {module}" in done.stdout


@pytest.mark.parametrize(
    ("raised", "code"), [(DanceError("do this"), 2), (KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)]
)
def test_what_a_command_raises_becomes_its_exit_code(raised, code, capsys):
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise raised

    with pytest.raises(SystemExit) as ended:
        start(app, "fail", [])
    assert ended.value.code == code
    if code == 2:
        assert capsys.readouterr().err.startswith("error: ")


def test_a_request_to_end_unwinds():
    unwound = []

    def wait():
        with plain_errors():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                unwound.append(True)

    with pytest.raises(SystemExit) as ended:
        wait()
    assert ended.value.code == 143
    assert unwound


@pytest.mark.parametrize("given_back", [RuntimeError, DanceError])
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_that_a_library_gives_back_as_its_own_error_is_still_a_signal(number, code, said, given_back, capsys):
    def search():
        with plain_errors():
            try:
                os.kill(os.getpid(), number)
                time.sleep(5)
            except BaseException as raised:
                raise given_back("parallel_for error") from raised

    with pytest.raises(SystemExit) as ended:
        search()
    assert ended.value.code == code
    assert capsys.readouterr().err == said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_the_command_line_loads_leaves_no_traceback():
    script = """
import os, signal, sys
class AtTyper:
    def find_spec(name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, AtTyper)
from dance_tvm.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_cuts_no_word_and_says_what_options_take(name, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit, match="0"):
        start(_table_of_commands(), "dance-tvm", [*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert ("╭" in shown) == (columns == "120")
    assert not any(words in shown for words in ("int range", "<bool>", "--verbose <", "-v      <"))
    assert not re.search(r"\w\.\.\.$", shown, re.MULTILINE)


@pytest.mark.parametrize(("raised", "code"), [("SystemExit(3)", 3), ("SystemExit()", 0), ("ValueError(4)", 1)])
def test_a_command_that_is_over_ends_without_taking_libraries_apart(raised, code):
    script = f"""
import atexit, sys
from dance_tvm.core import cli
class Library:
    def __del__(self): print("taken apart", flush=True)
def command():
    atexit.register(print, "what is to be done at the end")
    print("the result")
    raise {raised}
cli.main, cli.library = command, Library()
from dance_tvm.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "the result\nwhat is to be done at the end\n"
    assert done.returncode == code
    assert ("ValueError" in done.stderr) == (code == 1)


def test_a_package_that_is_missing_is_named():
    with (
        pytest.raises(DanceError, match=r"^importing net\.pt2 needs the Python package torch: pip install torch$"),
        unexpected_told(lambda: "importing net.pt2"),
    ):
        raise ModuleNotFoundError("No module named 'torch.export'", name="torch.export")
