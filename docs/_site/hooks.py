"""What MkDocs does beside rendering docs/: pages from the code, the README as the first page, files from outside."""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
reference = importlib.import_module("reference")  # MkDocs loads this file alone, not its folder

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?(\))")
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, the repository's own and the files that pages link to."""
    from mkdocs.structure.files import File

    for place, text in reference.pages().items():
        files.append(File.generated(config, place, content=text))
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for name in OTHERS:
        files.append(File.generated(config, name.lower(), content=(ROOT / name).read_text(encoding="utf-8")))
    for path in sorted(_outside(files)):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they stand in the repository become links of the site."""
    at_root = page.file.src_uri == "index.md" or page.file.src_uri.upper().replace(".MD", ".md") in OTHERS
    place = "" if at_root else posixpath.dirname(f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(place, target))
        if path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif path in OTHERS:
            path = path.lower()
        elif path == "README.md":
            path = "index.md"
        elif (ROOT / path).is_dir():
            return (
                f"{match[1]}{posixpath.relpath('reference/targets.md', posixpath.dirname(page.file.src_uri) or '.')})"
            )
        else:
            path = f"files/{path}"
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{match[1]}{posixpath.relpath(path, start)}{match[3] or ''})"

    return markdown if page.file.src_uri.startswith("reference/") else LINK.sub(moved, markdown)


def _outside(files: Any) -> set[str]:
    """Files of the repository outside docs/ that pages link to."""
    found = set()
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        for match in LINK.finditer(path.read_text(encoding="utf-8")):
            target = (path.parent / match[2]).resolve() if "://" not in match[2] else None
            inside = target is None or not target.is_file() or (ROOT / "docs") in target.parents
            if not inside and target.suffix != ".md":
                found.add(target.relative_to(ROOT).as_posix())
    return found
