"""Functions and files short enough to be seen whole: 60 lines of a function's body, 450 of a file.

A signature is not counted: those of commands have one line for each option.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_OF_A_FUNCTION, MOST_OF_A_FILE = 60, 450
#: Longer ones, each with its reason.
EXEMPT = {
    "dance_tvm/device/serve.py": "a device gets it as one file",
}


def sources(root: Path) -> list[Path]:
    """Every module of the package, each once: ``dance_tvm/schedules`` is a link to ``schedules``."""
    return sorted(
        path
        for package in ("dance_tvm", "schedules")
        for path in (root / package).rglob("*.py")
        if path.relative_to(root).parts[:2] != ("dance_tvm", "schedules")
    )


def too_long(root: Path) -> list[str]:
    """Functions and files over the limits."""
    found = []
    for path in sources(root):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(root))
        if (lines := text.count("\n")) > MOST_OF_A_FILE and name not in EXEMPT:
            found.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > MOST_OF_A_FUNCTION:
                    found.append(f"{name}: {node.name} has {lines} lines")
    return found


def test_functions_and_files_are_short() -> None:
    assert not too_long(ROOT)


def test_exemptions_are_needed() -> None:
    for name in EXEMPT:
        assert (ROOT / name).read_text(encoding="utf-8").count("\n") > MOST_OF_A_FILE, f"{name} is short now"


def test_long_ones_are_found(tmp_path: Path) -> None:
    (tmp_path / "schedules").mkdir()
    (tmp_path / "dance_tvm").mkdir()
    statements = "\n".join("    x = 1" for _ in range(61))
    (tmp_path / "schedules" / "a.py").write_text(f'def f(\n    x,\n):\n    """One line."""\n{statements}\n')
    (tmp_path / "dance_tvm" / "b.py").write_text("x = 1\n" * 451)
    assert too_long(tmp_path) == ["dance_tvm/b.py: 451 lines", "schedules/a.py: f has 61 lines"]
