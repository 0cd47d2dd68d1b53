"""An aarch64 device on this machine: a small Debian under qemu-user, behind `dance_server` or TVM's tracker and server.

The system is made once in the user's cache folder: Debian packages by mmdebstrap, TVM's aarch64 wheels by pip.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout

from dance_tvm.core.errors import DanceError
from dance_tvm.core.places import cache_folder
from dance_tvm.device import processes
from dance_tvm.device.server_program import kept_server
from dance_tvm.machines.target import load_target

KEY = "emulated-aarch64"
START_TIMEOUT_S = 300.0  # about 10 s on an idle machine, many times that on a loaded one
PREPARE_TIMEOUT_S = 1800.0

SUITE = "bookworm"
PYTHON = "3.11"  # what the suite has
DEBIAN_PACKAGES = (
    "libc6",
    "libstdc++6",
    "libgcc-s1",
    "zlib1g",
    f"python{PYTHON}",
    f"python{PYTHON}-minimal",
    f"libpython{PYTHON}-stdlib",
)
WHEELS = ("apache-tvm", "apache-tvm-ffi", "numpy", "ml_dtypes", "typing_extensions", "cloudpickle")
GLIBC_2_36 = [f"manylinux_2_{minor}_aarch64" for minor in (36, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_aarch64"]


def why_no_emulator() -> str | None:
    """None if the device can be had here, else the reason and what mends it."""
    if not sys.platform.startswith("linux"):
        return "the emulated device needs Linux"
    missing = [] if _qemu() else ["qemu-user"]
    if not _folder().exists() and not shutil.which("mmdebstrap"):
        missing.append("mmdebstrap")
    if missing:
        return f"{' and '.join(missing)} missing: run `apt-get update && apt-get install {' '.join(missing)}` as root"
    return None


def prepare(progress: Callable[[str], object] = print) -> Path:
    """The device's system in the cache folder, made now if it is not there yet.

    Raises DanceError where packages are missing, the registries do not answer, or the disk is full.
    """
    folder = _folder()
    if folder.exists():
        return folder
    if reason := why_no_emulator():
        raise DanceError(f"there is no emulated device here: {reason}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=PREPARE_TIMEOUT_S):
            if not folder.exists():
                _make(folder, progress)
    except Timeout:
        raise DanceError(f"another process has held {folder}.lock for too long: end it, or remove the file") from None
    except OSError as error:
        why = f"{error.strerror or error}: set DANCE_TVM_CACHE to a folder that can be written"
        raise DanceError(f"the emulated device cannot be kept in {folder.parent} ({why})") from None
    return folder


def start_program(stack: contextlib.ExitStack) -> int:
    """Start `dance_server` on an emulated device; the stack ends it. Gives its port."""
    system = prepare(lambda sentence: None)
    *qemu, _python = python_command(system)
    program = kept_server(load_target("aarch64-linux"), system)
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="dance_tvm_emulator_", ignore_cleanup_errors=True))
    command = [*qemu, str(program), "--store", str(Path(home) / "store"), "--end-with-stdin"]
    server = processes.PortProcess("the emulated device's server", command)
    stack.callback(server.stop)
    return server.wait_ready(processes.DEVICE_READY, START_TIMEOUT_S)


def start(
    stack: contextlib.ExitStack,
    store: Path | None = None,
    options: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Start a tracker and an emulated device with TVM, registered there; the stack ends both. Gives the tracker's port.

    ``options`` are more options for qemu, and ``environment`` more variables for the server.
    """
    system = prepare(lambda sentence: None)
    tracker, port = processes.start_tracker(START_TIMEOUT_S)
    stack.callback(tracker.stop)
    qemu, *python = python_command(system)
    home = stack.enter_context(tempfile.TemporaryDirectory(prefix="dance_tvm_emulator_", ignore_cleanup_errors=True))
    server, _ = processes.start_server(
        KEY,
        ("127.0.0.1", port),
        store or Path(home) / "store",
        python=[qemu, *options, *python],
        timeout=START_TIMEOUT_S,
        environment={"TMPDIR": home, **environment},
    )
    stack.callback(server.stop)
    return port


def python_command(system: Path) -> list[str]:
    """The command that starts the device's Python under qemu."""
    qemu = _qemu()
    if qemu is None:
        raise DanceError(f"there is no emulated device here: {why_no_emulator()}")
    root = system / "root"
    environment = {
        "PYTHONHOME": root / "usr",
        "PYTHONPATH": system / "site",
        # Artifacts for Android ask for libm.so and libc.so: the device answers to these names too.
        "LD_LIBRARY_PATH": system / "android",
        "TVM_USE_RUNTIME_LIB": "1",
    }
    settings = [word for name, value in environment.items() for word in ("-E", f"{name}={value}")]
    return [qemu, "-L", str(root), *settings, str(root / "usr/bin" / f"python{PYTHON}")]


def _qemu() -> str | None:
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def _folder() -> Path:
    recipe = json.dumps([SUITE, DEBIAN_PACKAGES, _requirements(), _recipe_version()])
    return cache_folder() / f"emulator-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def _recipe_version() -> int:
    """To be raised whenever `_make` does something else."""
    return 2


def _requirements() -> list[str]:
    """The wheels in the very versions that are installed here: the binary interface changes between releases."""
    return [f"{name}=={version(name)}" for name in WHEELS]


def _make(folder: Path, progress: Callable[[str], object]) -> None:
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # we hold the lock: whoever made it was killed
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        progress("fetching a small arm64 Debian with mmdebstrap")
        mode = "root" if os.geteuid() == 0 else "chrootless"  # user namespaces may be forbidden
        debian = ["mmdebstrap", "--variant=extract", "--architectures=arm64", f"--mode={mode}", "--skip=check/qemu"]
        include = f"--include={','.join(DEBIAN_PACKAGES)}"
        _run([*debian, include, SUITE, str(staging / "root")], "the Debian packages")
        progress("fetching TVM's aarch64 wheels with pip")
        platforms = [word for platform in GLIBC_2_36 for word in ("--platform", platform)]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(staging / "site"), "--no-deps"]
        foreign = ["--no-compile", "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
        _run([*pip, *foreign, *platforms, *_requirements()], "the aarch64 wheels")
        _trim(staging)
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _trim(staging: Path) -> None:
    """Leave out the compiler, which a device does not need (half of the size), and answer to Android's names."""
    (staging / "site/tvm/lib/libtvm_compiler.so").unlink(missing_ok=True)
    android = staging / "android"
    android.mkdir()
    for name, real in {"libm.so": "libm.so.6", "libc.so": "libc.so.6", "libdl.so": "libdl.so.2"}.items():
        library = next((staging / "root").rglob(real))  # below /lib or /usr/lib
        (android / name).symlink_to(Path("..") / library.relative_to(staging))


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PREPARE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DanceError(f"{what} did not arrive within {PREPARE_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith(("E:", "ERROR", "E "))]
        reason = (errors or done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise DanceError(f"{what} for the emulated device cannot be fetched: {reason}")
