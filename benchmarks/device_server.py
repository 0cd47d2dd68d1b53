"""Does `dance_server` stand what a network can send: mutated sessions, and manifests sealed anew.

    python -m benchmarks.device_server --sessions 5000 --manifests 1000

The server is compiled with the address and undefined-behaviour sanitizers (gcc). Each session is a sound one with one
place changed: bits and bytes, lengths, pieces cut, doubled or moved, requests in another order. After every hundred a
sound session must be answered as before; a report of a sanitizer, or a server that ended, is an error.
"""

from __future__ import annotations

import hashlib
import random
import re
import socket
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import typer
from torch import nn

from dance_tvm import DanceError, build_network, open_device
from dance_tvm.artifact.c_interface import INTERFACE
from dance_tvm.artifact.folder import Artifact
from dance_tvm.artifact.staging import MANIFEST
from dance_tvm.device.processes import PortProcess
from dance_tvm.device.server_connection import Operation
from dance_tvm.device.server_program import SOURCES

MAGIC, PROTOCOL = 0x45434E44, 1
HELLO = struct.pack("<III", MAGIC, PROTOCOL, 0) + bytes(32)
END = struct.pack("<IIQ", 250, 0, 0)  # is refused: a session that is still sound ends here
PATIENCE_S = 0.2  # some changed requests ask for many runs, or announce more than comes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(sessions: int = 5000, manifests: int = 1000, seed: int = 0) -> None:
    """Send mutated sessions and manifests to a sanitized server."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifact = small_network(folder / "network")
        server = PortProcess(
            "dance_server", [str(sanitized(folder)), "--store", str(folder / "store"), "--end-with-stdin"]
        )
        try:
            port = server.wait_ready("dance-tvm device ready on port ", 60)
            answered = sound(port, artifact)
            told: Counter[str] = Counter()
            for number in range(sessions):
                told[send(port, changed(dice, requests(artifact)))] += 1
                if number % 100 == 99:
                    require(server, np.array_equal(sound(port, artifact), answered), f"session {number}")
            for _ in range(manifests):
                told[send(port, with_manifest(artifact, resealed(dice, artifact)))] += 1
            require(server, np.array_equal(sound(port, artifact), answered), "the last session")
        finally:
            server.stop()
    for sentence, times in told.most_common():
        print(f"{times:6} x {sentence}")
    print(f"{sessions} sessions and {manifests} manifests: no report of a sanitizer, every sound session answered")


def small_network(out: Path) -> Artifact:
    """One convolution and one layer whose weights are apart."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8)).eval()
    clip = (torch.zeros(1, 3, 4, 4, 4),)
    built = build_network(network, example_inputs=clip, out=out, threads=2)
    return built.artifact


def sanitized(folder: Path) -> Path:
    """The program, by the system's compiler."""
    program = folder / "dance_server"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(path) for path in sorted(SOURCES.glob("*.c")) if path.name != "start.c"]
    subprocess.run(
        ["gcc", *flags, f"-I{INTERFACE}", *sources, "-o", str(program), "-ldl", "-lm", "-lpthread"], check=True
    )
    return program


def clip_of(artifact: Artifact) -> np.ndarray:
    """A clip for the network."""
    (tensor,) = artifact.manifest.inputs
    return np.random.default_rng(0).standard_normal(tensor.shape).astype(tensor.dtype)


def sound(port: int, artifact: Artifact) -> np.ndarray:
    """What a sound session answers."""
    with open_device(f"rpc://127.0.0.1:{port}", timeout=30) as device:
        (tensor,) = artifact.manifest.inputs
        (found,) = device.load(artifact).run({tensor.name: clip_of(artifact)}).values()
        return found


def request(operation: int, data: bytes = b"") -> bytes:
    """A request's bytes."""
    return struct.pack("<IIQ", operation, 0, len(data)) + data


def uploaded(data: bytes) -> list[bytes]:
    """Requests that bring a file."""
    digest = hashlib.sha256(data).digest()
    return [
        request(Operation.HAVE, digest + struct.pack("<Q", len(data))),
        request(Operation.APPEND, digest + struct.pack("<Q", 0) + data[: 1 << 16]),
        request(Operation.FINISH, digest),
    ]


def requests(artifact: Artifact) -> list[bytes]:
    """One of each kind, in an order that is sound; the artifact's files are in the store."""
    manifest = (artifact.path / MANIFEST).read_bytes()
    digest, clip = hashlib.sha256(manifest).digest(), clip_of(artifact).tobytes()
    first, twice = struct.pack("<II", 0, 0), struct.pack("<II", 0, 2)
    return [
        HELLO,
        request(Operation.FACTS),
        request(Operation.SENSORS),
        request(Operation.PIN, struct.pack("<II", 1, 0)),
        *uploaded(b"a small file"),
        request(Operation.LOAD, digest + struct.pack("<II", 2, 0)),
        request(Operation.NAMES, first),
        request(Operation.RUN, first + clip),
        request(Operation.TIME, twice + clip),
        request(Operation.PROFILE, twice + clip),
        request(Operation.LOOK, first + clip),
        request(Operation.RESET_PEAK),
        request(Operation.PEAK),
        request(Operation.UNLOAD, first),
    ]


def changed(dice: random.Random, pieces: list[bytes]) -> bytes:
    """A session with one thing wrong; more often in the heads of requests than in their data."""
    at = dice.randrange(len(pieces))
    piece = bytearray(pieces[at])
    kind = dice.randrange(7)
    if kind == 0:
        piece[dice.randrange(len(piece))] ^= 1 << dice.randrange(8)
    elif kind == 1:
        place = dice.randrange(min(24, len(piece)))
        piece[place] = dice.randrange(256)
    elif kind == 2:
        length = dice.choice([0, 1, 7, 8, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, dice.getrandbits(64)])
        piece[8:16] = struct.pack("<Q", length)
    elif kind == 3:
        place = dice.randrange(0, len(piece), 4)
        piece[place : place + 4] = struct.pack("<I", dice.choice([0, 1, 63, 64, 2**31 - 1, 2**31, 2**32 - 1]))
    elif kind == 4:
        del piece[dice.randrange(len(piece)) :]
    elif kind == 5:
        piece = piece * 2
    else:
        pieces[at], other = pieces[dice.randrange(len(pieces))], pieces[at]
        piece = bytearray(other if at % 2 else pieces[at])
    pieces[at] = bytes(piece)
    return b"".join(pieces)


def resealed(dice: random.Random, artifact: Artifact) -> bytes:
    """A changed manifest whose seal fits, as whoever writes one can make it."""
    text = bytearray((artifact.path / MANIFEST).read_bytes())
    marks = [b'"files"', b'"model.so"', b'"sha256"', b'"weights.safetensors"', b"\n }", b"{", b"}"]
    mark = dice.choice(marks)
    places = [match.start() for match in re.finditer(re.escape(mark), text)] or [0]
    place = dice.choice(places)
    kind = dice.randrange(4)
    if kind == 0:
        del text[place : place + dice.randrange(1, 80)]
    elif kind == 1:
        text[place : place + 1] = dice.randbytes(dice.randrange(1, 9))
    elif kind == 2:
        text[place:place] = dice.choice(marks) * dice.randrange(1, 4)
    else:
        del text[place:]
    found = re.search(rb'\n "seal": "([0-9a-f]*)"', text)
    if found is None:
        return bytes(text) + b'\n "seal": "' + b"0" * dice.randrange(70)
    empty = text[: found.start(1)] + text[found.end(1) :]
    return bytes(empty[: found.start(1)] + hashlib.sha256(empty).hexdigest().encode() + empty[found.start(1) :])


def with_manifest(artifact: Artifact, manifest: bytes) -> bytes:
    """A session that brings the manifest, loads by it, and runs."""
    load = hashlib.sha256(manifest).digest() + struct.pack("<II", 1, 0)
    run = struct.pack("<II", 0, 0) + clip_of(artifact).tobytes()
    pieces = [HELLO, *uploaded(manifest), request(Operation.LOAD, load), request(Operation.RUN, run)]
    return b"".join(pieces)


def send(port: int, data: bytes) -> str:
    """What the server first refused."""
    said, heard = "closed without a word", b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.settimeout(PATIENCE_S)
        try:
            connection.sendall(data + END)
            while piece := connection.recv(1 << 20):
                heard += piece
        except TimeoutError:
            said = "waited for more"
        except OSError:
            said = "closed in the middle"
    at = 44
    while at + 16 <= len(heard):
        status, _, size = struct.unpack_from("<IIQ", heard, at)
        if status == 1:
            return "refused: " + heard[at + 16 : at + 16 + size].decode(errors="replace")
        at += 16 + size
    return said


def require(server: PortProcess, answered: bool, where: str) -> None:
    """Raise DanceError where the server ended, a sanitizer spoke, or a sound session is answered otherwise."""
    words = server.said()
    if not server.running or not answered or "Sanitizer" in words or "runtime error" in words:
        raise DanceError(f"at {where}: {words[-3000:] or 'a sound session was answered otherwise'}")


if __name__ == "__main__":
    app()
