"""docs/networks.md from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs/networks.md"


def write_page(results: dict[str, Any]) -> None:
    """Write the page."""
