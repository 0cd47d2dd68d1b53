"""Options that several commands take, in the same words."""

from __future__ import annotations

from typing import Annotated

import typer

PLACES = "local, emulator, rpc://HOST:PORT or tracker://HOST:PORT/KEY"

Model = Annotated[str, typer.Option(help="Name of the zoo, or a .pt2 or .onnx file.")]
TargetName = Annotated[str, typer.Option(help="Name, alias or .toml file; `dance-tvm targets` lists them.")]
Devices = Annotated[list[str] | None, typer.Option(help=f"{PLACES}; repeatable.", show_default="local")]

#: More threads than these no artifact runs on: ``MOST_THREADS`` of artifact/interface/runtime.h.
MOST_THREADS = 64
Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads per run; default: the target's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
