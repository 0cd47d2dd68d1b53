"""Compiled kernels that are kept for later builds: object files by a hash of all that their bytes follow from.

A cache and no more: whatever is missing, damaged, not ours or cannot be written costs one compilation and never a wrong
answer. Several builds may use it at once, since files appear whole, under names made of their content.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from dance_tvm.core.places import cache_folder

#: What may lie in the cache, in bytes; ``DANCE_TVM_KERNELS_MIB`` says otherwise. Beyond it, what was not used for
#: longest goes. A network has 1 to 20 MiB of kernels.
LIMIT = 1 << 30

_FOLDER, _SUFFIX, _PARTIAL = "kernels", ".o", ".partial-"
_DIGEST = hashlib.sha256().digest_size
_SHRINK_TO = 0.9  # of the limit, so that not every build has to look for what can go
_ABANDONED_S = 3600.0  # age of a partly written file that is no longer being written


class KernelCache:
    """Object files in ``folder``, at most ``limit`` bytes of them.

    The folder is by default ``$DANCE_TVM_KERNELS``, or ``kernels`` in the user's cache.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        chosen = os.environ.get("DANCE_TVM_KERNELS")
        self.folder = folder or (Path(chosen) if chosen else cache_folder() / _FOLDER)
        self.limit = _limit() if limit is None else limit

    def read(self, key: str) -> bytes | None:
        """The object file of ``key``, a hexadecimal hash; None where there is none that is whole."""
        path = self.folder / f"{key}{_SUFFIX}"
        try:
            if not _is_ours(self.folder):
                return None
            content = path.read_bytes()
        except OSError:
            return None
        digest, code = content[:_DIGEST], content[_DIGEST:]
        if digest != _digest(key, code):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return code

    def write(self, key: str, code: bytes) -> None:
        """Keep ``code`` under ``key``."""
        with suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(self.folder):
                return
            handle, beside = tempfile.mkstemp(prefix=_PARTIAL, dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_digest(key, code) + code)
                os.replace(beside, self.folder / f"{key}{_SUFFIX}")
            except OSError:
                os.unlink(beside)

    def shrink(self) -> None:
        """Remove what was not used for longest until the limit is kept, and what killed builds left half written."""
        with suppress(OSError):
            found = [(entry.stat(), Path(entry.path)) for entry in os.scandir(self.folder) if entry.is_file()]
            partial = [(status, path) for status, path in found if path.name.startswith(_PARTIAL)]
            for status, path in partial:
                if status.st_mtime < time.time() - _ABANDONED_S:
                    path.unlink(missing_ok=True)
            kept = sorted((status.st_mtime, status.st_size, path) for status, path in found if path.suffix == _SUFFIX)
            total = sum(size for _, size, _ in kept)
            if total <= self.limit:
                return
            for _, size, path in kept:
                if total <= self.limit * _SHRINK_TO:
                    break
                path.unlink(missing_ok=True)
                total -= size


def _digest(key: str, code: bytes) -> bytes:
    """What a file begins with: of its name as well, so that a renamed one is not taken for another."""
    return hashlib.sha256(key.encode() + b"\0" + code).digest()


def _is_ours(folder: Path) -> bool:
    """Whether no other user can put code into ``folder``, which runs in our processes."""
    status = folder.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _limit() -> int:
    with suppress(KeyError, ValueError):
        return int(os.environ["DANCE_TVM_KERNELS_MIB"]) << 20
    return LIMIT
