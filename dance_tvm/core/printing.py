"""What commands print: tables and sentences for whoever watches, plain lines for whatever reads.

On a terminal a table has a frame, its texts fold where there is little room, and its figures never do; where there is
too little for them too, each cell stands behind its head, over as many lines as a row takes. Elsewhere each row is one
line, as wide as its cells are, whatever COLUMNS says.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as Framed

#: A text column of a table may become so narrow, and no narrower.
_NARROWEST_TEXT = 12
_FIGURE = re.compile(r"[-+~<>]?[\d.,]+(e[-+]?\d+)?[%x]?|-|")
_STYLES = {"works": "green", "free": "green", "missing": "yellow", "busy": "yellow", "broken": "red", "lost": "red"}

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """What `print_table` takes: heads of columns, rows of cells, and what stands above and below."""

    heads: Sequence[str]
    rows: Rows
    title: str = ""
    caption: str = ""


def counted(number: int, noun: str) -> str:
    """``number`` of what ``noun`` names in the singular: 1 record, 2 records."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plain_number(value: float, digits: int = 4) -> str:
    """``value`` to this many significant digits, never with an exponent: 0.00009, 1,234 as 1234."""
    return f"{Decimal(f'{value:.{digits}g}'):f}"


def duration(seconds: float) -> str:
    """A time to three digits, in the unit that suits it: 0.09 µs, 52.1 µs, 3.62 ms, 28.2 s."""
    scale, unit = (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1, "s")
    return f"{plain_number(scale * seconds, 3)} {unit}"


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", caption: str = "") -> None:
    """Print a table on standard output; columns of figures are set to the right."""
    print_tables([Table(heads, [list(row) for row in rows], title, caption)])


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables one below the other, all in the same form: framed where each has the room."""
    console = _terminal()
    framing = console is not None and all(_least_width(table.heads, table.rows) <= console.width for table in tables)
    for place, table in enumerate(tables):
        if place:
            print()
        if console is not None and framing:
            console.print(framed(table.heads, table.rows, table.title, table.caption))
        else:
            text = plain(table.heads, table.rows, table.title, table.caption)
            print(text if console is None else _wrapped(text, table, console.width))


def _terminal() -> Console | None:
    """The terminal that standard output is, if it is one."""
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console()


def plain(heads: Sequence[str], rows: Rows, title: str = "", caption: str = "") -> str:
    """A table with one line per row, its cells below one another; heads that are all empty are left out."""
    widths = [_width(heads, rows, index) for index in range(len(heads))]
    right = [_is_of_figures(rows, index) for index in range(len(heads))]
    lines = [
        "  ".join(
            cell.rjust(width) if figures else cell.ljust(width)
            for cell, width, figures in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in ([heads, *rows] if any(heads) else rows)
    ]
    return "\n".join([*([title] if title else []), *lines, *([caption] if caption else [])])


def _wrapped(text: str, table: Table, width: int) -> str:
    """``text``, the plain form of ``table``, where it fits; else each row's cells behind their heads, over lines."""
    if max(map(len, text.splitlines()), default=0) <= width:
        return text
    heads = ["", *(f"{head} " if head else "" for head in table.heads[1:])]  # what a row is about names itself
    rows = ["  ".join(head + cell for head, cell in zip(heads, row, strict=True) if cell) for row in table.rows]
    return "\n".join(
        textwrap.fill(line, max(width, 5), subsequent_indent="    ", break_on_hyphens=False)
        for line in [table.title, *rows, table.caption]
        if line
    )


def framed(heads: Sequence[str], rows: Rows, title: str = "", caption: str = "") -> Framed:
    """The same as a table of rich."""
    from rich.table import Table as Framed
    from rich.text import Text

    above, below = (Text(text) if text else None for text in (title, caption))
    table = Framed(title=above, caption=below, show_header=any(heads))
    for index, head in enumerate(heads):
        if _is_of_figures(rows, index):
            width = _width(heads, rows, index)
            table.add_column(Text(head), justify="right", no_wrap=True, min_width=width)
        else:
            table.add_column(Text(head), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return table


def _least_width(heads: Sequence[str], rows: Rows) -> int:
    widths = [
        _width(heads, rows, index) if _is_of_figures(rows, index) else min(_NARROWEST_TEXT, _width(heads, rows, index))
        for index in range(len(heads))
    ]
    return sum(widths) + 3 * len(widths) + 1


def _is_of_figures(rows: Rows, index: int) -> bool:
    return bool(rows) and all(_FIGURE.fullmatch(row[index]) for row in rows)


def _width(heads: Sequence[str], rows: Rows, index: int) -> int:
    return max(len(row[index]) for row in [heads, *rows])
