"""docs/operators.md: operator by operator, what two public suites found.

python -m benchmarks.conformance.page
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/operators.md"
SUITES = {"onnx": "onnx_backend", "opinfo": "opinfo"}


def main() -> None:
    """Write the page anew from the results that are there."""
    parts = ["# Operators", "", _INTRODUCTION]
    for name, module in SUITES.items():
        path = RESULTS / f"conformance-{name}.json"
        if path.exists():
            parts += _suite(json.loads(path.read_text(encoding="utf-8")), module)
    PAGE.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(PAGE.relative_to(ROOT))


_INTRODUCTION = """\
Public suites of operators, each case built for this machine, run, and compared with its source: outputs within 1e-3
relative, NaN and infinities in the same places. **Works**: every case is right. **With limits**: some cases are
refused, each with one sentence; the first is quoted. **Refused**: all are.
"""


def _suite(results: dict[str, Any], module: str) -> list[str]:
    """One suite's section."""
    total = sum(results["summary"].values())
    ended = ", ".join(f"{count} {status}" for status, count in results["summary"].items() if count)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    by_operator: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in results["cases"]:
        by_operator[case["operator"]].append(case)
    lines = [
        f"## {results['suite']}",
        "",
        f"`python -m benchmarks.conformance.{module}`: {total} cases: {ended} ({versions}).",
        "",
        "| operator | | right | of | what is refused |",
        "|---|---|---|---|---|",
    ]
    return [*lines, *(_row(name, by_operator[name]) for name in sorted(by_operator, key=str.lower)), ""]


def _row(operator: str, cases: list[dict[str, Any]]) -> str:
    counted = Counter(case["status"] for case in cases if case["status"] != "skipped")
    right, total = counted["right"], counted.total()
    verdict = "works" if right == total else "with limits" if right else "refused"
    others = [case for case in cases if case["status"] not in ("right", "skipped")]
    sentence = f"{others[0]['case']}: {others[0].get('message', '')}" if others else ""
    if others and others[0]["status"] != "refused":
        verdict = others[0]["status"]
    return f"| `{operator}` | {verdict} | {right} | {total} | {_cell(sentence)} |"


def _cell(text: str) -> str:
    one_line = " ".join(text.split()).replace("|", "\\|")
    return one_line if len(one_line) <= 200 else f"{one_line[:199]}…"


if __name__ == "__main__":
    main()
