"""Folders of the user: what can be fetched again, and what cannot."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$DANCE_TVM_CACHE``, else ``dance_tvm`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("DANCE_TVM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dance_tvm"


def data_folder() -> Path:
    """``dance_tvm`` under ``$XDG_DATA_HOME`` or ``~/.local/share``."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "dance_tvm"
