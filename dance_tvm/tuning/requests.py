"""On what a target may be measured, known before a device is opened."""

from __future__ import annotations

from dance_tvm.core.errors import DanceError
from dance_tvm.device import require_spec, why_no_emulator
from dance_tvm.machines.target import Target, load_target


def require_devices_of(machine: Target, devices: list[str]) -> None:
    """Raise DanceError where a device is none, or known not to be the target: its times would be taken for those."""
    for spec in devices:
        require_spec(spec)
        if spec == "local" and machine.gpu is None and machine.fingerprint != load_target("host").fingerprint:
            raise DanceError(
                f"--device local is this machine and not {machine.name}: what is measured here says nothing of it; "
                f"give --device rpc://… or tracker://… of such a device, or --target host"
            )
        if spec == "emulator" and machine.gpu is not None:
            raise DanceError(
                f"--device emulator has no GPU, for which {machine.name} builds: give rpc://… or tracker://…"
            )
        if spec == "emulator" and machine.link.machine != "aarch64":
            raise DanceError(f"--device emulator is an aarch64 processor, which {machine.name} is not")
        if spec == "emulator" and (reason := why_no_emulator()):
            raise DanceError(f"there is no emulated device here: {reason}")
