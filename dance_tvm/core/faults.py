"""What pydantic found wrong, in our words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

#: What a value must be, by the kind of pydantic's fault; the bounds stand in its context.
_WANTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "literal_error": "{expected}",
}


def said_of(fault: ErrorDetails) -> str:
    """What is wrong with a field, without pydantic's own words where we have some."""
    wanted = _WANTED.get(fault["type"])
    if wanted is not None:
        return f"must be {wanted.format(**fault.get('ctx', {}))}, not {fault['input']!r}"
    return fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")


def place_of(fault: ErrorDetails, otherwise: str = "") -> str:
    """Where the field stands."""
    return ".".join(map(str, fault["loc"])) or otherwise
