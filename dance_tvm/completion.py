"""``dance-tvm completion``: a shell's completion script, made from the commands themselves."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import typer

from dance_tvm.core.cli import COMMANDS, application, examples, start

app = application()


@app.command(
    epilog=examples(
        "dance-tvm completion bash > ~/.local/share/bash-completion/completions/dance-tvm",
        "dance-tvm completion zsh > ~/.zfunc/_dance-tvm",
        "dance-tvm completion fish > ~/.config/fish/completions/dance-tvm.fish",
    )
)
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell.")]) -> None:
    """Print a shell's completion script; save it where the shell looks for such scripts."""
    words = {" ".join(path): sorted(found) for path, found in _words()}
    typer.echo(_fish(words) if shell == "fish" else _bash(words, shell))


def _words() -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """For the words before, the words that may follow: commands and options."""
    yield (), {*COMMANDS, "--help", "--version", "--verbose", "--quiet"}
    for name, (module, _) in COMMANDS.items():
        yield from _of(typer.main.get_command(importlib.import_module(module).app), (name,))


def _of(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    inner = getattr(command, "commands", {})
    words = {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
    yield path, {"--help", *inner, *(word for word in words if word.startswith("--"))}
    for name, each in inner.items():
        yield from _of(each, (*path, name))


_BASH = """\
{head}_dance_tvm() {{
    local words="" path="" word current="${{COMP_WORDS[COMP_CWORD]}}"
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$path $word" in
            {known}) path="$path $word" ;;
        esac
    done
    case "$path" in
{cases}
    esac
    if [[ "$current" == -* || -z "$path" ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    else
        COMPREPLY=($(compgen -W "$words" -- "$current") $(compgen -f -- "$current"))
    fi
}}
complete -o filenames -F _dance_tvm dance-tvm"""


def _bash(words: dict[str, list[str]], shell: str) -> str:
    known = "|".join(f'" {path}"' for path in words if path)
    cases = "\n".join(
        f'        "{f" {path}" if path else ""}") words="{" ".join(found)}" ;;' for path, found in words.items()
    )
    # zsh runs bash's completion functions when asked to.
    head = "#compdef dance-tvm\nautoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _BASH.format(head=head, known=known, cases=cases)


def _fish(words: dict[str, list[str]]) -> str:
    lines = []
    for path, found in words.items():
        seen = path.split()
        condition = " ; and ".join(f"__fish_seen_subcommand_from {word}" for word in seen) or "__fish_use_subcommand"
        for word in found:
            kind = f"-l {word[2:]}" if word.startswith("--") else f"-f -a {word}"
            lines.append(f"complete -c dance-tvm -n '{condition}' {kind}")
    return "\n".join(lines)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.completion")
