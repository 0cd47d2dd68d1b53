"""Documents: links lead somewhere, and what is generated from the code is whole."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


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
