"""``dance-tvm report``: turn measurements into a page to look at, Markdown, or JSON."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dance_tvm.cli import application, start

app = application()


class Paper(str, Enum):
    dance = "dance"
    rt3d = "rt3d"
    dstep = "dstep"


class Form(str, Enum):
    html = "html"
    markdown = "markdown"
    json = "json"


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Results written by `dance-tvm bench --out`.")],
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="beside the results")] = None,
    form: Annotated[Form | None, typer.Option("--format", help="By the name of --out unless given.")] = None,
    paper: Annotated[list[Paper] | None, typer.Option(help="Lay the paper's published figures beside ours.")] = None,
    tuning: Annotated[list[Path] | None, typer.Option(help="Tuning log to draw the curve of; repeatable.")] = None,
) -> None:
    """Turn measurements into one page that works offline, or into Markdown."""
    from dance_tvm.benchmarking.results import read_results
    from dance_tvm.reporting.page import html, markdown, write_text

    measured = read_results(results)
    suffixes = {Form.html: ".html", Form.markdown: ".md", Form.json: ".json"}
    by_suffix = {suffix: name for name, suffix in suffixes.items()}
    chosen = form or by_suffix.get(out.suffix if out else "", Form.html)
    papers = [name.value for name in paper or []]
    if chosen is Form.html:
        text = html(measured, papers, tuning or [])
    else:
        text = markdown(measured, papers) if chosen is Form.markdown else measured.model_dump_json(indent=1) + "\n"
    path = out or results.with_suffix(suffixes[chosen])
    write_text(path, text)
    typer.echo(path)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.report")
