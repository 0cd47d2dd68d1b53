"""ONNX Runtime and MNN on the emulated aarch64 device: how many instructions one call of a layer takes there.

Their aarch64 wheels, in the versions installed here, are fetched by pip. The emulated processor is a Cortex-A76, as
it answers for itself in /proc/cpuinfo: ONNX Runtime ends there where that file tells of another machine's processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from dance_tvm.core.errors import DanceError
from dance_tvm.core.places import cache_folder
from dance_tvm.device.emulator import GLIBC_2_36, PYTHON, python_command

from .engines import Case, mnn_model
from .instructions import count_calls

PEERS = ("onnxruntime", "mnn", "mnn-exact", "mnn-half")
WHEELS = ("onnxruntime", "MNN")
CPU = "cortex-a76"
CPUINFO = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""

_ONNXRUNTIME = """
import sys
sys.path.append(sys.argv[1])
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[2] + "/model.onnx", options, providers=["CPUExecutionProvider"])
inputs = {session.get_inputs()[0].name: numpy.load(sys.argv[2] + "/input-0.npy")}
for _ in range(int(sys.argv[3])):
    session.run(None, inputs)
"""
_MNN = """
import sys
sys.path.append(sys.argv[1])
import numpy, MNN
interpreter = MNN.Interpreter(sys.argv[2] + "/model.mnn")
if EXACT:
    interpreter.setSessionHint(3, 0)  # no Winograd
session = interpreter.createSession({"numThread": 1, "backend": "CPU", "precision": PRECISION})
x = numpy.load(sys.argv[2] + "/input-0.npy")
held = MNN.Tensor(x.shape, MNN.Halide_Type_Float, x, MNN.Tensor_DimensionType_Caffe)
interpreter.getSessionInput(session).copyFrom(held)
for _ in range(int(sys.argv[3])):
    interpreter.runSession(session)
"""
_SETTINGS = {"mnn": (False, "high"), "mnn-exact": (True, "high"), "mnn-half": (False, "low")}
PROGRAMS = {
    "onnxruntime": _ONNXRUNTIME,
    **{name: f"EXACT, PRECISION = {settings}{_MNN}" for name, settings in _SETTINGS.items()},
}


class EmulatedPeers:
    """The engines' wheels and a root for the emulated device, made in the cache folder once.

    Raises DanceError where a wheel cannot be had.
    """

    def __init__(self, system: Path) -> None:
        folder = cache_folder() / "-".join(["aarch64", *_requirements()])
        self._site, root = folder / "site", folder / "root"
        if not self._site.exists():
            _fetch(self._site)
        if not root.exists():
            (root / "proc").mkdir(parents=True)
            (root / "proc/cpuinfo").write_text(CPUINFO)
            for entry in (system / "root").iterdir():
                if entry.name != "proc":
                    (root / entry.name).symlink_to(entry)
        qemu, _, _, *rest = python_command(system)
        self._python = [qemu, "-cpu", CPU, "-L", str(root), *rest]

    def instructions(self, peer: str, case: Case, calls: int = 1) -> int:
        """Instructions of one call of the exported layer ``case``, on one thread."""
        if peer.startswith("mnn"):
            mnn_model(case)
        return count_calls(self._python, PROGRAMS[peer], [self._site, case.folder], calls)


def _requirements() -> list[str]:
    return [f"{name}=={version(name)}" for name in WHEELS]


def _fetch(site: Path) -> None:
    beside = site.with_name(f".site-{os.getpid()}")
    platforms = [word for platform in GLIBC_2_36 for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(beside), "--no-deps", "--no-compile"]
    foreign = ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    done = subprocess.run([*pip, *foreign, *platforms, *_requirements()], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DanceError(f"the aarch64 wheels of {' and '.join(WHEELS)} cannot be had: {' '.join(reason[-1:])}")
    beside.rename(site)
