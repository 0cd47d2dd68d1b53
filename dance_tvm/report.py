"""``dance-tvm report``: turn measurements into a page to look at, Markdown, or JSON."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.files import require_suffix

app = application()


class Paper(str, Enum):
    """Papers whose published figures are known."""

    dance = "dance"
    rt3d = "rt3d"
    dstep = "dstep"


Form = Literal["html", "markdown", "json"]
SUFFIXES: dict[Form, str] = {"html": ".html", "markdown": ".md", "json": ".json"}


@app.command(
    epilog=examples("dance-tvm report results.json", "dance-tvm report results.json --format markdown --paper dance")
)
def report(
    results: Annotated[Path, typer.Argument(help="Results written by `dance-tvm bench --out`.")],
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="beside the results")] = None,
    form: Annotated[Form | None, typer.Option("--format", help="By the name of --out unless given.")] = None,
    paper: Annotated[list[Paper] | None, typer.Option(help="Lay the paper's published figures beside ours.")] = None,
    tuning: Annotated[list[Path] | None, typer.Option(help="Tuning log to draw the curve of; repeatable.")] = None,
) -> None:
    """Turn measurements into one page that works offline, or into Markdown."""
    if out is not None and form is None:
        require_suffix(out, "--out", tuple(SUFFIXES.values()))
    from dance_tvm.benchmarking.results import read_results
    from dance_tvm.reporting.page import html, markdown, write_text

    measured = read_results(results)
    by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}
    chosen = form or by_suffix.get(out.suffix if out else "", "html")
    papers = [name.value for name in paper or []]
    if chosen == "html":
        text = html(measured, papers, tuning or [])
    elif chosen == "markdown":
        text = markdown(measured, papers)
    else:
        text = measured.model_dump_json(indent=1) + "\n"
    path = out or results.with_suffix(SUFFIXES[chosen])
    write_text(path, text)
    typer.echo(path)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.report")
