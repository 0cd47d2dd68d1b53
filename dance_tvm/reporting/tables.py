"""Tables of a page, and how they become HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class Link:
    """A cell that leads to another row of the page; ``place`` is that row's name."""

    text: str
    place: str

    def __str__(self) -> str:
        return self.text


Cell = str | Link


@dataclass(frozen=True)
class Table:
    """A heading, a sentence, and cells; the first ``words`` columns hold words, the others numbers.

    ``places`` names rows, so that links can lead to them.
    """

    title: str
    text: str
    heads: list[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    places: list[str] = field(default_factory=list)


def as_html(table: Table) -> str:
    """The table alone, in a box that scrolls where it is wider or much higher than the screen."""
    heads = "".join(
        f"<th scope=col{'' if index < table.words else ' class=number'}>{escape(head)}</th>"
        for index, head in enumerate(table.heads)
    )
    places = [f' id="{escape(place)}"' for place in table.places] or [""] * len(table.rows)
    rows = "".join(
        f"<tr{place}>{''.join(_cell(cell, index < table.words) for index, cell in enumerate(row))}</tr>\n"
        for place, row in zip(places, table.rows, strict=True)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title or "figures")}"><table>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def as_markdown(table: Table) -> list[str]:
    """Lines: heading, sentence, table."""
    rule = [":--" if index < table.words else "--:" for index in range(len(table.heads))]
    lines = [f"## {table.title}", "", table.text, "", _line(table.heads), _line(rule)]
    return lines + [_line(row) for row in table.rows] + [""]


def _cell(cell: Cell, words: bool) -> str:
    text = escape(str(cell))
    if isinstance(cell, Link):
        text = f'<a href="#{escape(cell.place)}">{text}</a>'
    long = words and len(str(cell)) > 40
    kind = ' class="long"' if long else "" if words else ' class="number"'
    return f"<td{kind}>{text}</td>"


def _line(cells: Sequence[Cell]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
