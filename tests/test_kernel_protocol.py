"""What is asked of kernels is asked through their protocol: outside ``schedules/`` nobody asks of which class one is,
and nothing is read out of a name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Methods of strings that take a name apart, and what names of kernels are called.
APART = {"startswith", "endswith", "split", "rsplit", "partition", "rpartition", "removeprefix", "removesuffix"}
NAMES = {"kernel", "symbol", "operand", "operands", "callee", "name_hint"}


def kernel_classes(root: Path) -> set[str]:
    """Names of the classes in ``schedules/`` that are kernels, by their bases."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for path in (root / "schedules").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    found = {"Kernel"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def imported(nodes: list[ast.AST]) -> set[str]:
    """What a module imports from ``schedules/``."""
    froms = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and "schedules" in (node.module or "").split(".")
    ]
    return {alias.asname or alias.name for node in froms for alias in node.names}


def offences(root: Path) -> Iterator[str]:
    """Lines outside ``schedules/`` that ask for a kernel's class, or take the name of a kernel or an operand apart."""
    kernels = kernel_classes(root)
    for path in sorted((root / "dance_tvm").rglob("*.py")):
        where = path.relative_to(root)
        if where.parts[:2] == ("dance_tvm", "schedules"):
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        classes = kernels & imported(nodes)
        for node in nodes:
            if not isinstance(node, ast.Call):
                continue
            line = f"{where}:{node.lineno}"
            if ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked = {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
                yield from (f"{line}: asks for {name}" for name in sorted(asked & classes))
            elif isinstance(node.func, ast.Attribute) and node.func.attr in APART:
                taken = {getattr(each, "attr", getattr(each, "id", "")) for each in ast.walk(node.func.value)}
                yield from (f"{line}: takes {name} apart" for name in sorted(taken & NAMES))


def test_kernels_are_known_by_their_protocol_alone() -> None:
    assert {"Convolution", "Either", "Pool", "Sort", "CountingSort"} <= kernel_classes(ROOT)
    assert list(offences(ROOT)) == []


OFFENDING = """
from .schedules.a import Other
def f(kernel, layer):
    isinstance(kernel, Other)
    layer.kernel.startswith("conv")
"""


def test_offences_are_found(tmp_path: Path) -> None:
    for folder, text in {
        "schedules": "class Own(Kernel): ...\nclass Other(Own): ...\n",
        "dance_tvm": OFFENDING,
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(text)
    assert list(offences(tmp_path)) == ["dance_tvm/a.py:4: asks for Other", "dance_tvm/a.py:5: takes kernel apart"]
