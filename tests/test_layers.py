"""No module imports one of a layer above its own, and none imports itself through others; docs/architecture.md has the
layers. Imports inside functions and for types alone count like any other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: The modules directly in the package: each is a command, or what the package itself offers.
COMMANDS = "commands"


@dataclass(frozen=True)
class Import:
    """One module that a line of another one imports."""

    importer: str
    imported: str
    where: str


def layers(page: str) -> list[list[str]]:
    """The table of layers in the section of that name, the topmost first; packages of one layer stand in one row."""
    section = page.split("\n## Layers\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return [found for row in rows[2:] if (found := re.findall(r"`([\w.]+)`", row))]


def modules(root: Path) -> dict[str, Path]:
    """Every module by its full name; ``schedules`` is reached through a link in ``dance_tvm``."""
    found = {}
    for package in ("dance_tvm", "schedules"):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[:2] != ("dance_tvm", "schedules"):
                name = ".".join(parts if package == "dance_tvm" else ("dance_tvm", *parts))
                found[name.removesuffix(".__init__")] = path
    return found


def imports(root: Path) -> Iterator[Import]:
    """What every line of every module imports of ours."""
    known = modules(root)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, name, path.name == "__init__.py", known):
                if target.split(".")[0] == "dance_tvm":
                    yield Import(name, target, f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}")


def _targets(node: ast.AST, name: str, is_package: bool, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        above = name.split(".") if is_package else name.split(".")[:-1]
        start = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
        base = ".".join(part for part in (start, node.module or "") if part)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in known else base


def layer_of(module: str, order: list[list[str]]) -> str:
    """The longest name in the table that ``module`` is of."""
    path = module.removeprefix("dance_tvm").removeprefix(".")
    named = [name for row in order for name in row if f"{path}.".startswith(f"{name}.")]
    return max(named, key=len, default=COMMANDS if "." not in path else path)


def upward(found: list[Import], order: list[list[str]]) -> list[str]:
    """A sentence for each import that does not go down."""
    height = {name: -at for at, row in enumerate(order) for name in row}
    said = []
    for each in found:
        importer, imported = layer_of(each.importer, order), layer_of(each.imported, order)
        if missing := {importer, imported} - set(height):
            said.append(f"{each.where}: {', '.join(sorted(missing))} is not in the table of layers")
        elif importer == imported and importer != COMMANDS:
            continue
        elif height[imported] >= height[importer] and each.imported != "dance_tvm":
            said.append(f"{each.where}: {each.importer} ({importer}) must not import {each.imported} ({imported})")
    return said


def circles(found: list[Import]) -> list[str]:
    """A sentence for each import over which a module reaches itself."""
    after: dict[str, set[str]] = {}
    for each in found:
        after.setdefault(each.importer, set()).add(each.imported)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            fresh = after.get(waiting.pop(), set()) - seen
            seen |= fresh
            waiting += fresh
        return seen

    behind = {name: reached(name) for name in after}
    return [
        f"{each.where}: {each.importer} imports {each.imported}, which imports {each.importer} again"
        for each in found
        if each.importer in behind.get(each.imported, set())
    ]


def test_no_module_imports_one_of_a_layer_above_it() -> None:
    order = layers((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert not upward(list(imports(ROOT)), order)


def test_no_module_imports_itself_through_others() -> None:
    assert not circles(list(imports(ROOT)))


def test_the_table_names_every_package_and_no_other() -> None:
    order = layers((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    named = {name for row in order for name in row} - {COMMANDS}
    packages = {
        name.removeprefix("dance_tvm.")
        for name, path in modules(ROOT).items()
        if path.name == "__init__.py" and name != "dance_tvm"
    }
    assert named == packages


PAGE = """
## Layers

| layer | what |
|---|---|
| `commands` | |
| `engine` | |
| `wheels`, `seats` | |

## More
"""
FILES = {
    "dance_tvm/__init__.py": "",
    "dance_tvm/drive.py": "from dance_tvm.engine.motor import Motor\n",
    "dance_tvm/park.py": "from dance_tvm import drive\n",
    "dance_tvm/engine/__init__.py": "",
    "dance_tvm/engine/motor.py": "from ..wheels import rim\nfrom .piston import Piston\n",
    "dance_tvm/engine/piston.py": "def of():\n    from .motor import Motor\n    return Motor\n",
    "dance_tvm/wheels/__init__.py": "",
    "dance_tvm/wheels/rim.py": "import typing\nif typing.TYPE_CHECKING:\n    import dance_tvm.engine.piston\n",
    "dance_tvm/seats/__init__.py": "from dance_tvm.wheels.rim import Rim\nfrom dance_tvm.roof.tiles import Tile\n",
    "schedules/__init__.py": "",
}


def test_what_is_found_in_a_package_with_every_fault(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = list(imports(tmp_path))
    assert upward(found, layers(PAGE)) == [
        "dance_tvm/park.py:1: dance_tvm.park (commands) must not import dance_tvm.drive (commands)",
        "dance_tvm/seats/__init__.py:1: dance_tvm.seats (seats) must not import dance_tvm.wheels.rim (wheels)",
        "dance_tvm/seats/__init__.py:2: roof.tiles is not in the table of layers",
        "dance_tvm/wheels/rim.py:3: dance_tvm.wheels.rim (wheels) must not import dance_tvm.engine.piston (engine)",
    ]
    assert [each.split(":")[0] for each in circles(found)] == [
        "dance_tvm/engine/motor.py",
        "dance_tvm/engine/motor.py",
        "dance_tvm/engine/piston.py",
        "dance_tvm/wheels/rim.py",
    ]
