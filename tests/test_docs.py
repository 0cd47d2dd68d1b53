"""Documents: links lead somewhere, and what is generated from the code is whole."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")

#: Pages for those who change the compiler: their code names inner modules.
FOR_DEVELOPERS = {ROOT / "docs" / "extending.md"}


@pytest.fixture(scope="module")
def reference():
    sys.path.insert(0, str(ROOT / "docs" / "_site"))
    import reference

    sys.path.pop(0)
    return reference


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in LINK.findall(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in slugs(found.read_text(encoding="utf-8")), f"{page.name} links to {target}"


def missing_places(table: str) -> list[str]:
    """Files and names in code quotes of ``table`` that there are not; paths begin in ``dance_tvm`` or in the root."""
    paths = [path for name in ("dance_tvm", "schedules") for path in (ROOT / name).rglob("*.*")]
    files = [path for path in paths if path.suffix in (".py", ".c", ".h", ".toml", ".html")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text("utf-8") for path in files)))
    names, wrong = {path.name for path in files}, []
    for quoted in re.findall(r"`([\w./]*\w)`", table):
        if re.search(r"\.(py|c|h|html)$", quoted):
            known = quoted in names or any((ROOT / base / quoted).is_file() for base in ("", "dance_tvm"))
        else:
            known = "/" in quoted or quoted.split(".")[-1] in words
        wrong += [] if known else [quoted]
    return wrong


def test_architectures_table_of_places_names_what_there_is():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = page.split("\n## Where is")[1].split("\n## ")[0]
    assert missing_places(table) == ["schedules/cpu/NAME.py"]  # any kernel's
    assert missing_places("`core/cli.py`, `core/nowhere.py`, `Kernel.nowhere_to_be_found`") == [
        "core/nowhere.py", "Kernel.nowhere_to_be_found",
    ]  # fmt: skip


def test_the_sites_navigation_leads_to_pages(reference):
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M))
    here = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    made = {*reference.pages(), "index.md", "contributing.md", "changelog.md", "security.md"}
    assert named <= here | made
    assert set(reference.pages()) <= named


def test_reference_pages_tell_all_that_the_code_has(reference):
    from dance_tvm.artifact.folder import Manifest
    from dance_tvm.core.cli import COMMANDS
    from dance_tvm.machines.target import Target

    pages = reference.pages()
    assert all(f"## dance-tvm {name}" in pages["reference/commands.md"] for name in COMMANDS)
    assert "`--debug-dump`" in pages["reference/commands.md"]
    for model, place in ((Manifest, "manifest"), (Target, "targets")):
        assert all(f"| `{field}` |" in pages[f"reference/{place}.md"] for field in model.model_fields)
    assert "## build_network" in pages["reference/python.md"]


def test_every_refusal_says_what_to_do(reference):
    found = list(reference.all_refusals())
    assert len(found) > 250
    assert all(refusal.wrong and refusal.do for refusal in found)


def users_code() -> Iterator[tuple[str, str]]:
    """Python that users read, and where it stands: every block of every page, and the examples."""
    for page in sorted({*PAGES} - FOR_DEVELOPERS):
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S), 1):
            yield f"{page.relative_to(ROOT)}, block {number}", block
    for path in sorted((ROOT / "examples").rglob("*.py")):
        yield str(path.relative_to(ROOT)), path.read_text("utf-8")
    for path in sorted((ROOT / "examples").rglob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        yield str(path.relative_to(ROOT)), "\n\n".join("".join(cell["source"]) for cell in cells)


def inner(code: str) -> list[str]:
    """What ``code`` takes of ours beside the names that ``dance_tvm`` itself offers."""
    from dance_tvm import __all__ as offered

    taken: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            taken += [alias.name for alias in node.names if alias.name.startswith("dance_tvm.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("dance_tvm", "schedules"):
            whole = node.module == "dance_tvm"
            taken += [f"{node.module}.{alias.name}" for alias in node.names if not (whole and alias.name in offered)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dance_tvm":
            taken += [f"dance_tvm.{node.attr}"] if node.attr not in offered else []
    return taken


def test_users_code_takes_the_six_names_alone():
    from dance_tvm import __all__ as offered

    assert sorted(offered) == ["DanceError", "Options", "build_network", "import_model", "load_artifact", "open_device"]
    code = dict(users_code())
    assert {"README.md, block 1", "examples/demo.py", "examples/quickstart.ipynb"} <= set(code)
    assert {where: found for where, text in code.items() if (found := inner(text))} == {}
    for page in PAGES:  # what is run from a shell is a command of the table
        assert not re.findall(r"python3? -m dance_tvm\.\S+", page.read_text("utf-8")), page.name


def test_what_is_found_in_code_that_takes_more():
    wrong = (
        "import dance_tvm.core.cli\nfrom dance_tvm import Options, models\nfrom dance_tvm.device import open_device\n"
    )
    assert inner(wrong + "dance_tvm.models.create('c3d')\ndance_tvm.Options()\n") == [
        "dance_tvm.core.cli", "dance_tvm.models", "dance_tvm.device.open_device", "dance_tvm.models",
    ]  # fmt: skip
