"""Where tuning logs lie: those that come with the package, and those that a user's own runs write."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from dance_tvm.core.places import data_folder

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target

SHIPPED = Path(__file__).parents[1] / "tuning_logs"
IN_PROJECT = "tuning_logs"


def own_logs() -> Path:
    """Where tuning writes: ``tuning_logs`` of the folder that the user works in if it is there, else the user's own."""
    here = Path.cwd() / IN_PROJECT
    return here if here.is_dir() else data_folder() / "tuning_logs"


def log_folders(logs: Path | None = None) -> list[Path]:
    """Where builds look: in ``logs`` only if given, else in the user's own logs before those of the package."""
    if logs is not None:
        return [logs]
    own = own_logs()
    return [own] if own.resolve() == SHIPPED.resolve() else [own, SHIPPED]


def digest_of_logs(target: Target, logs: Path | None = None) -> str:
    """A hash of what the target's logs outside of the package hold, those of the package being part of its sources;
    empty where there are none."""
    digest, found = hashlib.sha256(), False
    for folder in log_folders(logs):
        if folder.resolve() == SHIPPED.resolve():
            continue
        for path in sorted(folder.glob(f"{target.tuning_log}.*.jsonl")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
            found = True
    return digest.hexdigest()[:16] if found else ""
