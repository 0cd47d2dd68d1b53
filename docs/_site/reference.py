"""Reference pages as Markdown, read from the code: commands, Python, schemas, every refusal's sentence."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def pages() -> dict[str, str]:
    """Markdown by its path below docs/."""
    return {
        "reference/commands.md": commands(),
        "reference/python.md": python(),
        "reference/manifest.md": manifest(),
        "reference/targets.md": targets(),
        "reference/refusals.md": refusals(),
    }


# -- commands ---------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its options, from the same declarations that parse them."""
    import typer

    from dance_tvm.core.cli import COMMANDS

    lines = ["# Commands", "", "Every command also takes `--help`, `-v` and `-q`.", ""]
    for name, (module, _) in COMMANDS.items():
        command = typer.main.get_command(importlib.import_module(module).app)
        lines += _command(f"dance-tvm {name}", command)
    return "\n".join(lines)


def _command(name: str, command: Any) -> list[str]:
    inner = getattr(command, "commands", None)
    if inner:
        found = [f"## {name}", "", _flat(command.help or ""), ""]
        for word, each in inner.items():
            found += _command(f"{name} {word}", each)
        return found
    lines = [f"## {name}", "", *[part.strip() for part in (command.help or "").split("\n")], ""]
    lines += ["| option | | unless given |", "|---|---|---|"]
    for each in command.params:
        words = f"`{each.name.upper()}`" if each.param_type_name == "argument" else _words(each)
        if not {"--help", "--verbose", "--quiet"} & set(each.opts):
            lines.append(f"| {words} | {_cell(getattr(each, 'help', '') or '')} | {_cell(_default(each))} |")
    shown = [line for line in (command.epilog or "").split("\n") if line.startswith("dance-tvm")]
    return [*lines, "", "```console", *(f"$ {line}" for line in shown), "```", ""]


def _words(option: Any) -> str:
    return ", ".join(f"`{word}`" for word in [*option.opts, *option.secondary_opts])


def _default(each: Any) -> str:
    shown = getattr(each, "show_default", None)
    if isinstance(shown, str):
        return shown
    if each.required:
        return "needed"
    default = each.default
    if default is None or default is False or callable(default):
        return ""
    return str(getattr(default, "value", default))


# -- Python -----------------------------------------------------------------------------------------------------------


def python() -> str:
    """What `dance_tvm` offers, from its docstrings."""
    import dance_tvm

    lines = ["# Python", "", "What `dance_tvm` offers, imported when first used.", ""]
    for name in dance_tvm.__all__:
        found = getattr(dance_tvm, name)
        lines += [f"## {name}", "", "```python", f"{name}{_signature(found)}", "```", ""]
        lines += [inspect.getdoc(found) or "", ""]
        for method, function in _methods(found):
            lines += [f"**`{name}.{method}{inspect.signature(function)}`**", "", inspect.getdoc(function) or "", ""]
    sessions = importlib.import_module("dance_tvm.device.session")
    for kind in (sessions.DeviceSession, sessions.LoadedNetwork):
        lines += [f"## {kind.__name__}", "", inspect.getdoc(kind) or "", ""]
        for method, function in _methods(kind):
            lines += [f"**`{method}{inspect.signature(function)}`**", "", inspect.getdoc(function) or "", ""]
    return "\n".join(lines)


def _signature(found: Any) -> str:
    try:
        return str(inspect.signature(found))
    except ValueError:  # an exception's is its base's, which has none
        return "(message)"


def _methods(found: Any) -> list[tuple[str, Any]]:
    if not inspect.isclass(found):
        return []
    own = [(name, value) for name, value in vars(found).items() if not name.startswith("_")]
    return [(name, value) for name, value in own if inspect.isfunction(value) and value.__doc__]


# -- schemas ----------------------------------------------------------------------------------------------------------


def manifest() -> str:
    """The manifest's fields, from the model that validates it."""
    from dance_tvm.artifact.folder import SCHEMA_VERSION, Manifest

    intro = (
        f"`manifest.json` of an artifact, schema version {SCHEMA_VERSION}; `dance-tvm show ARTIFACT --json` prints it."
    )
    return _schema("Manifest", intro, Manifest.model_json_schema())


def targets() -> str:
    """A target file's fields, and the targets that are shipped."""
    from dance_tvm.machines.target import Target

    shipped = ", ".join(f"`{path.stem}`" for path in sorted((ROOT / "targets").glob("*.toml")))
    intro = f"A target is a TOML file; `--target` takes its path, or the name of one that is shipped: {shipped}."
    return _schema("Targets", intro, Target.model_json_schema())


def _schema(title: str, intro: str, schema: dict[str, Any]) -> str:
    lines = [f"# {title}", "", intro, ""]
    for name, part in [(schema["title"], schema), *sorted(schema.get("$defs", {}).items())]:
        lines += [f"## {name}", "", _flat(part.get("description", "")), ""]
        if "properties" not in part:
            continue
        lines += ["| field | type | unless given |", "|---|---|---|"]
        needed = set(part.get("required", []))
        for field, told in part["properties"].items():
            default = "needed" if field in needed else f"`{told.get('default')}`" if "default" in told else ""
            lines.append(f"| `{field}` | {_cell(_type(told))} | {default} |")
        lines.append("")
    return "\n".join(lines)


def _type(told: dict[str, Any]) -> str:
    if "$ref" in told:
        name = told["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in told:
        return " or ".join(_type(each) for each in told["anyOf"])
    if "enum" in told or "const" in told:
        return ", ".join(f"`{value}`" for value in told.get("enum", [told.get("const")]))
    if told.get("type") == "array":
        return f"list of {_type(told.get('items', {}))}"
    if told.get("type") == "object":
        inner = told.get("additionalProperties")
        return f"{_type(inner)} by name" if isinstance(inner, dict) and inner else "object"
    return {"null": "nothing"}.get(told.get("type", ""), told.get("type", "anything"))


# -- refusals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """One sentence that the code can say; what it fills in stands as …"""

    package: str
    wrong: str
    do: str


#: What to do where a sentence itself names nothing, by the part of the code that says it.
ADVICE = {
    "artifact": "build the artifact again, or copy it again if it came from another machine",
    "benchmarking": "check the options against `dance-tvm bench --help`",
    "compiler": "build with `--debug-dump DIR -vv` and report what it says",
    "core": "check the path and the options",
    "device": "`dance-tvm doctor` and `dance-tvm device list --probe` say what is missing",
    "frontend": "export it again ([export.md](../export.md)); [operators.md](../operators.md) says what is taken",
    "liveness": "report the network, with the traceback that `-vv` prints",
    "lowering": "report the network, with the traceback that `-vv` prints",
    "machines": "compare the target file with [targets](targets.md)",
    "models": "check the name and the weights",
    "records": "`dance-tvm logs check` says what is wrong with a log",
    "reporting": "bench again with this version",
    "schedules": "report the network, with the traceback that `-vv` prints",
    "sparsity": "check the options against `dance-tvm train --help`",
    "transform": "report the network, with the traceback that `-vv` prints",
    "tuning": "`dance-tvm logs check` says what is wrong with a log",
}


def refusals() -> str:
    """Every sentence of a DanceError in the code, with what to do."""
    lines = [
        "# Every refusal", "",
        "What a command says when it ends with exit code 2, and what to do; … stands for what it fills in. The same "
        "sentences are the messages of `DanceError` in Python. `-vv` prints the traceback too.", "",
    ]  # fmt: skip
    found: dict[str, list[Refusal]] = {}
    for refusal in all_refusals():
        found.setdefault(refusal.package, []).append(refusal)
    for package, each in sorted(found.items()):
        lines += [f"## {package}", "", "| it says | what to do |", "|---|---|"]
        told = dict.fromkeys(f"| {_cell(refusal.wrong)} | {_cell(refusal.do)} |" for refusal in each)
        lines += [*sorted(told), ""]
    return "\n".join(lines)


def all_refusals() -> Iterator[Refusal]:
    """Read from the code: every message that a DanceError is raised with."""
    for top in ("dance_tvm", "schedules"):
        for path in sorted((ROOT / top).rglob("*.py")):
            place = path.relative_to(ROOT)
            package = place.parts[1] if len(place.parts) > 2 and top == "dance_tvm" else top
            package = "commands" if package == "dance_tvm" else package
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DanceError" and node.args:
                    sentence = _said(node.args[0]).strip()
                    if len(sentence.replace("…", "").strip()) > 5:
                        yield _split(package, sentence)


def _said(node: ast.expr) -> str:
    """The text of a string, a formatted string, or a sum of such."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_said(each) for each in node.values)
    if isinstance(node, ast.BinOp):
        return _said(node.left) + _said(node.right)
    return "…"


def _split(package: str, sentence: str) -> Refusal:
    """What is wrong, and what to do: behind the last colon or semicolon that words follow."""
    at = max(sentence.rfind(": "), sentence.rfind("; "))
    rest = sentence[at + 2 :].strip() if at > 0 else ""
    if len(rest.replace("…", "").split()) >= 2:
        return Refusal(package, sentence[:at].strip(), rest)
    if sentence.startswith("--"):
        return Refusal(package, sentence, "give that option another value: `--help` of the command shows examples")
    general = ADVICE.get(package, "`--help` of the command lists its options, and `-vv` prints the traceback")
    return Refusal(package, sentence, general)


def _flat(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _cell(text: str) -> str:
    return _flat(text).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(refusals())
