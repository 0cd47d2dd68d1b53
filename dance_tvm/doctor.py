"""``dance-tvm doctor``: what works on this machine, and the command that fixes the rest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from dance_tvm.core.cli import application, examples, start
from dance_tvm.core.errors import DanceError
from dance_tvm.core.options import AsJson
from dance_tvm.core.printing import print_table
from dance_tvm.core.progress import Progress
from dance_tvm.device import address_of

# The pair that is known to work; newer ffi releases crash in tvm.ir.save_json.
TVM = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
INSTALL_TVM = "pip install " + " ".join(f"{name}=={number}" for name, number in TVM.items())
PROBE_TIMEOUT_S = 120
GPU = "pip install 'dance-tvm[gpu]'"
BROKEN = 1

app = application()


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it works, what was seen, and the command that mends it where it does not.

    `missing` things are optional: without them something named cannot be done, and everything else can.
    """

    name: str
    state: Literal["works", "missing", "broken"]
    seen: str
    mend: str = ""


@app.command(epilog=examples("dance-tvm doctor", "dance-tvm doctor --tracker 127.0.0.1:9190"))
def doctor(
    tracker: Annotated[str | None, typer.Option(help="HOST:PORT of an RPC tracker that should answer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Report what works on this machine, and what fixes the rest. Exit code 1 if something needed is broken."""
    if tracker:
        address_of(tracker, "--tracker")
    with Progress(quiet=as_json) as progress:
        findings = examine(tracker, progress.phase)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(BROKEN)


def examine(tracker: str | None = None, on_look: Callable[[str], object] = lambda _name: None) -> list[Finding]:
    """Look at everything; nothing here can crash this process or wait for ever. ``on_look`` hears what is next."""
    looks: list[Callable[[], Finding]] = [
        python,
        versions,
        save_json,
        compile_and_run,
        linker,
        ndk,
        emulator,
        cuda,
        opencl,
        adb,
    ]
    if tracker:
        looks.append(partial(tracker_answers, tracker))
    findings = []
    for look in looks:
        on_look(_LOOKS.get(look, "tracker"))
        findings.append(look())
    return findings


def python() -> Finding:
    """Python and the machine."""
    seen = f"Python {platform.python_version()} on {platform.machine()} {platform.system()}"
    return Finding("python", "works", seen)


def versions() -> Finding:
    """TVM and its ffi are the pair that works."""
    found = {name: _version(name) for name in TVM}
    seen = ", ".join(f"{name} {number}" for name, number in found.items())
    return Finding("tvm versions", "works" if found == TVM else "broken", seen, "" if found == TVM else INSTALL_TVM)


def save_json() -> Finding:
    """TVM and ffi agree: with a wrong pair this call ends the process, so it runs in another one."""
    code = (
        "import tvm; from tvm import te; a = te.placeholder((4,), name='a'); "
        "b = te.compute((4,), lambda i: a[i] + 1.0); "
        "tvm.ir.load_json(tvm.ir.save_json(tvm.IRModule({'main': te.create_prim_func([a, b])})))"
    )
    problem = _probe(code)
    return Finding(
        "tvm save_json", "broken" if problem else "works", problem or "in a process", INSTALL_TVM if problem else ""
    )


def compile_and_run() -> Finding:
    """TVM generates code for this processor and runs it."""
    code = (
        "import numpy, tvm; from tvm import te; a = te.placeholder((4,), name='a'); "
        "b = te.compute((4,), lambda i: a[i] + 1.0); "
        "f = tvm.compile(te.create_prim_func([a, b]), tvm.target.Target({'kind': 'llvm'})); "
        "x = tvm.runtime.tensor(numpy.arange(4, dtype='float32')); y = tvm.runtime.empty((4,), 'float32'); "
        "f(x, y); assert y.numpy().tolist() == [1, 2, 3, 4]"
    )
    problem = _probe(code)
    return Finding(
        "code generator", "broken" if problem else "works", problem or "LLVM, run here", INSTALL_TVM if problem else ""
    )


def linker() -> Finding:
    """The linker makes shared libraries for both architectures."""
    from dance_tvm.artifact.linker import link_shared

    with tempfile.TemporaryDirectory() as folder:
        nothing = Path(folder) / "nothing.ld"
        nothing.write_text("")
        try:
            for triple in ("x86_64-linux-gnu", "aarch64-linux-gnu"):
                link_shared(Path(folder) / "empty.so", [nothing], triple)
        except DanceError as error:
            return Finding("linker", "broken", str(error), "pip install ziglang")
    return Finding("linker", "works", f"lld of ziglang {_version('ziglang')}, for x86_64 and aarch64")


def ndk() -> Finding:
    """The NDK's compiler, where the user wants it: lld links for Android without."""
    compiler = os.environ.get("TVM_NDK_CC", "")
    if not compiler:
        return Finding("android ndk", "works", "not set, not needed: lld links for Android")
    if shutil.which(compiler.split()[0]):
        return Finding("android ndk", "works", compiler)
    return Finding("android ndk", "broken", f"TVM_NDK_CC={compiler} is not a program", "unset TVM_NDK_CC")


def emulator() -> Finding:
    """The emulated aarch64 device."""
    from dance_tvm.device import why_no_emulator

    reason = why_no_emulator()
    if reason is None:
        return Finding("emulated aarch64 device", "works", "qemu-user and what prepares its system")
    mend = "apt-get update && apt-get install -y qemu-user mmdebstrap"
    return Finding("emulated aarch64 device", "missing", reason.split(":")[0], mend)


def cuda() -> Finding:
    """What compiles CUDA source for a Jetson without a GPU here."""
    wheels = {"nvidia.cuda_nvrtc": "nvidia-cuda-nvrtc-cu11", "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu11"}
    missing = [package for module, package in wheels.items() if not _importable(module)]
    if missing:
        return Finding("cuda compiler", "missing", f"no {', '.join(missing)}: no builds for Jetson", GPU)
    seen = ", ".join(f"{package} {_version(package)}" for package in wheels.values())
    return Finding("cuda compiler", "works", seen)


def opencl() -> Finding:
    """An OpenCL device, which may be this processor by PoCL: it runs GPU kernels to check and tune them."""
    code = (
        "from dance_tvm.core.errors import DanceError\nfrom dance_tvm.device.opencl import OpenCLSession\n"
        "try: OpenCLSession()\nexcept DanceError as error: raise SystemExit(str(error))"
    )
    problem = _probe(code)
    if not problem:
        return Finding("opencl", "works", "a device that compiles GPU kernels")
    seen, _, mend = problem.rpartition(": ")
    return Finding("opencl", "missing", f"{seen or problem}: GPU kernels are not checked here", mend if seen else GPU)


def adb() -> Finding:
    """The Android debug bridge, for phones on a cable."""
    found = shutil.which(os.environ.get("ADB", "adb"))
    if found:
        return Finding("adb", "works", found)
    return Finding("adb", "missing", "no adb: phones on a cable cannot be set up", "apt-get install -y adb")


def tracker_answers(address: str) -> Finding:
    """The tracker that the user named."""
    from dance_tvm.device.tracker import tracker_summary

    host, port = address_of(address, "--tracker")
    mend = f"python -m tvm.exec.rpc_tracker --host {host} --port {port}"
    try:
        summary = tracker_summary(host, port, timeout=5)
    except (OSError, DanceError) as error:
        return Finding("tracker", "broken", f"{address} does not answer: {error}", mend)
    keys = sorted(info["key"].removeprefix("server:") for info in summary["server_info"])
    return Finding("tracker", "works", f"{address} has {', '.join(keys) or 'no devices'}")


_LOOKS: dict[Callable[..., Finding], str] = {
    python: "python",
    versions: "versions of TVM",
    save_json: "TVM and its ffi, in a process of its own",
    compile_and_run: "code generator, in a process of its own",
    linker: "linker",
    ndk: "android ndk",
    emulator: "emulated device",
    cuda: "cuda compiler",
    opencl: "OpenCL, in a process of its own",
    adb: "adb",
}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _probe(code: str) -> str:
    """Run code in a process of its own; what went wrong in a few words, or nothing."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_TIMEOUT_S} s"
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1]
    return ""


def _print(findings: list[Finding]) -> None:
    rows = [[finding.name, finding.state, finding.seen, finding.mend] for finding in findings]
    print_table(["", "", "seen", "mended by"], rows)


if __name__ == "__main__":
    start(app, "python -m dance_tvm.doctor")
