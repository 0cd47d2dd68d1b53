"""Trials on devices of either kind: a library for TVM's servers, a sealed artifact for `dance_server`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dance_tvm.device.remote import RemoteSession
from dance_tvm.device.session import DeviceSession
from dance_tvm.tuning.farm import Server
from dance_tvm.tuning.instances import Instance, Loaded, Trial, build_instance
from dance_tvm.tuning.libraries import device_code_of

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target


def folder_of(library: Path) -> Path:
    """Where the sealed artifact of a trial stands: beside its library."""
    return library.with_suffix(".sealed")


def build_trial(instance: Instance, target: Target, path: Path, servers: frozenset[Server]) -> None:
    """Build a trial at ``path`` for devices behind these servers."""
    if "tvm" in servers:
        build_instance(instance, target, path)
    if "dance_server" in servers:
        from dance_tvm.tuning.sealed_trial import build_sealed

        build_sealed(instance, target, folder_of(path))


def is_built(path: Path, server: Server) -> bool:
    """Whether there is a trial for a server at ``path``."""
    return (path if server == "tvm" else folder_of(path)).exists()


def open_trial(session: DeviceSession, instance: Instance, path: Path, kind: str) -> Trial:
    """The trial built at ``path``, on the session's device of TVM's ``kind``."""
    if isinstance(session, RemoteSession):
        return Loaded.on(session, instance, path, kind)
    from dance_tvm.device.served import ServedSession
    from dance_tvm.tuning.sealed_trial import SealedTrial

    assert isinstance(session, ServedSession)
    return SealedTrial.on(session, instance, folder_of(path))


def remove_trial(path: Path) -> None:
    """Remove whatever was built at ``path``."""
    path.unlink(missing_ok=True)
    device_code_of(path).unlink(missing_ok=True)
    shutil.rmtree(folder_of(path), ignore_errors=True)
