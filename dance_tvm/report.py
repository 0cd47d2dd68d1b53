"""``dance-tvm report``: turn measurements into a page to look at, Markdown, or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import require_apart, require_suffix, require_writable

app = application()


class Paper(str, Enum):
    """Papers whose published figures are known."""

    dance = "dance"
    rt3d = "rt3d"
    dstep = "dstep"


Form = Literal["html", "markdown", "json"]
SUFFIXES: dict[Form, str] = {"html": ".html", "markdown": ".md", "json": ".json"}


@app.command(
    epilog=examples(
        "dance-tvm report results.json",
        "dance-tvm report results.json --format markdown --paper dance",
        "dance-tvm report before.json after.json --out compared.html",
    )
)
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Results written by `dance-tvm bench --out`; with two, the second is compared with the first."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="beside the results")] = None,
    form: Annotated[Form | None, typer.Option("--format", help="Default: by the name of --out.")] = None,
    paper: Annotated[list[Paper] | None, typer.Option(help="Show the paper's published figures beside ours.")] = None,
    tuning: Annotated[list[Path] | None, typer.Option(help="Tuning log to plot; repeatable.")] = None,
) -> None:
    """Turn measurements into one page that works offline, or into Markdown."""
    if len(results) > 2:
        raise DanceError("give one file of results, or two to compare")
    if out is not None:
        require_suffix(out, "--out", (SUFFIXES[form],) if form else tuple(SUFFIXES.values()))
        require_apart(out, "--out", {"the results": results, "--tuning": tuning})
        require_writable(out, "--out")
    if len(results) == 2 and (paper or tuning):
        raise DanceError("--paper and --tuning belong to one file of results: leave the second out")
    from dance_tvm.benchmarking.results import read_results
    from dance_tvm.reporting import page

    measured = [read_results(path) for path in results]
    by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}
    chosen = form or by_suffix.get(out.suffix if out else "", "html")
    beside = results[-1].with_suffix(SUFFIXES[chosen])
    if len(measured) == 2:
        from dance_tvm.reporting import compare

        content = compare.comparison(measured[0], measured[1], (str(results[0]), str(results[1])))
        facts = json.dumps(compare.facts(*measured), indent=1)
        beside = results[-1].with_name(f"{results[0].stem}-{results[1].stem}{SUFFIXES[chosen]}")
    else:
        content = page.page_of(measured[0], [name.value for name in paper or []], tuning or [])
        facts = measured[0].model_dump_json(indent=1)
    texts: dict[str, Callable[[Any], str]] = {
        "html": page.html,
        "markdown": page.markdown,
        "json": lambda _: facts + "\n",
    }
    path = out or beside
    page.write_text(path, texts[chosen](content))
    typer.echo(path)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.report")
