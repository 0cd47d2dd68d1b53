"""Where tuning logs lie: those that come with the package, and those that a user's own runs write."""

from __future__ import annotations

from pathlib import Path

from dance_tvm.core.places import data_folder

SHIPPED = Path(__file__).parents[1] / "tuning_logs"
IN_PROJECT = "tuning_logs"


def own_logs() -> Path:
    """Where tuning writes: ``tuning_logs`` of the folder that the user works in if it is there, else the user's own."""
    here = Path.cwd() / IN_PROJECT
    return here if here.is_dir() else data_folder() / "tuning_logs"


def log_folders(logs: Path | None = None) -> list[Path]:
    """Where builds look: in ``logs`` alone if given, else in the user's own logs before those of the package."""
    if logs is not None:
        return [logs]
    own = own_logs()
    return [own] if own.resolve() == SHIPPED.resolve() else [own, SHIPPED]
