"""What pydantic found wrong, in our words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def said_of(fault: ErrorDetails) -> str:
    """What is wrong with a field, without pydantic's own beginning before words that are ours."""
    return fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")


def place_of(fault: ErrorDetails, otherwise: str = "") -> str:
    """Where the field stands."""
    return ".".join(map(str, fault["loc"])) or otherwise
