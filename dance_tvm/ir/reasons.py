"""Why passes left operators as they were, or what they took out: sentences by the operator's variable."""

from __future__ import annotations

from collections.abc import Iterator

from tvm import relax


class Reasons:
    """Gathered by the passes of one build. A layer's are part of its description; ``--debug-dump`` lists all."""

    def __init__(self) -> None:
        self._by_name: dict[str, list[str]] = {}

    def add(self, var: relax.Var, sentence: str) -> None:
        """Keep ``sentence`` about the operator whose result is ``var``; twice the same is one."""
        sentences = self._by_name.setdefault(var.name, [])
        if sentence not in sentences:
            sentences.append(sentence)

    def of(self, name: str) -> str:
        """All that was said of the operator, empty if nothing was."""
        return "; ".join(self._by_name.get(name, []))

    def __iter__(self) -> Iterator[str]:
        """A line for each operator."""
        return (f"{name}: {self.of(name)}" for name in self._by_name)
