"""What the bytes of an artifact depend on besides the network: the versions of what made it."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("dance-tvm", "apache-tvm", "apache-tvm-ffi", "torch")
_SOURCES = (".py", ".c", ".h", ".toml", ".jsonl")  # code, targets and tuning logs


def versions() -> dict[str, str]:
    """Version of each package that takes part in a build, and as ``sources`` the hash of this compiler's own files."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"  # run from a source tree that was never installed
    return {**found, "sources": _sources_sha256()}


@lru_cache(maxsize=1)
def _sources_sha256() -> str:
    """The same for a checkout and for a wheel made from it."""
    root = Path(__file__).parents[1]
    paths = [
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(_SOURCES) and not name.startswith(".")
    ]
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
