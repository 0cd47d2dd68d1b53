"""How many aarch64 instructions one call of a built network executes, counted in emulation.

    python benchmarks/instructions.py ARTIFACT [ARTIFACT ...]      artifacts built for aarch64, one thread

A plugin of qemu adds up the instructions of every translated block as it is executed. Starting the emulated Python
takes a thousand times more than a call, so each artifact runs once and then four times: the difference is three calls,
the same number every time. Needs the emulated device (`dance-tvm doctor`) and a C compiler (cc, or the ziglang wheel).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dance_tvm.artifact import Artifact, load_artifact
from dance_tvm.compiler import random_inputs
from dance_tvm.device import prepare_emulator
from dance_tvm.device.emulator import prepare, python_command
from dance_tvm.errors import DanceError

TIMEOUT_S = 900
CALLS = 3

# qemu's plugin interface, version 1 (docs/devel/tcg-plugins.rst); its header is not packaged apart from qemu's source.
PLUGIN = r"""
#include <stdint.h>
#include <stdio.h>
#include <stddef.h>
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
typedef struct qemu_info_t qemu_info_t;
typedef void (*tb_trans_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*udata_cb)(qemu_plugin_id_t, void *);
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_trans_cb);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, udata_cb, void *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;
static uint64_t executed;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &executed,
                                             qemu_plugin_tb_n_insns(block));
}

static void ended(qemu_plugin_id_t id, void *data)
{
    fprintf(stderr, "\ninstructions %llu\n", (unsigned long long)executed);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
"""

# What the emulated Python runs: model.so, inputs.npz, weights in order, and how often.
PROGRAM = """
import sys, numpy, tvm
from tvm.runtime.vm import VirtualMachine
library, inputs, calls = sys.argv[1], numpy.load(sys.argv[2]), int(sys.argv[3])
machine = VirtualMachine(tvm.runtime.load_module(library), tvm.cpu())
arguments = [tvm.runtime.tensor(inputs[name]) for name in sorted(inputs.files, key=lambda name: int(name[4:]))]
for _ in range(calls):
    machine["main"](*arguments)
"""


def build_plugin(folder: Path) -> Path:
    """The counting plugin, compiled for this machine. Raises DanceError where the compiler fails."""
    source, library = folder / "count.c", folder / "libcount.so"
    source.write_text(PLUGIN)
    compiler = [shutil.which("cc") or ""] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    done = subprocess.run(
        [*compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise DanceError(f"qemu's counting plugin does not compile: {done.stderr.strip().splitlines()[-1]}")
    return library


def instructions(artifact: Artifact) -> int:
    """Instructions of one call of an artifact built for aarch64, its second and later ones.

    Raises DanceError where the emulated device is not there or cannot run the artifact.
    """
    system = prepare(lambda _sentence: None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugin = build_plugin(folder)
        inputs = random_inputs(artifact.manifest.inputs)
        arguments = [inputs[tensor.name] for tensor in artifact.manifest.inputs] + list(artifact.weights())
        np.savez(folder / "inputs.npz", *arguments)
        (folder / "run.py").write_text(PROGRAM)
        qemu, *rest = python_command(system)
        command = [qemu, "-plugin", str(plugin), "-E", "TVM_NUM_THREADS=1", *rest]

        def count(calls: int) -> int:
            program = [str(folder / "run.py"), str(artifact.library), str(folder / "inputs.npz"), str(calls)]
            done = subprocess.run([*command, *program], capture_output=True, text=True, timeout=TIMEOUT_S)
            counted = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("instructions ")]
            if done.returncode or not counted:
                reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise DanceError(f"{artifact.path} does not run on the emulated device: {reason}")
            return int(counted[-1])

        return (count(1 + CALLS) - count(1)) // CALLS


def main(artifacts: Annotated[list[Path], typer.Argument(help="built for aarch64, the dense one first")]) -> None:
    """Print the instructions of one call of each, and how many times fewer than the first's."""
    prepare_emulator()
    first = 0
    for path in artifacts:
        found = instructions(load_artifact(path))
        first = first or found
        print(f"{path}: {found / 1e6:.2f} M instructions a call, {first / found:.2f}x fewer than the first")


if __name__ == "__main__":
    typer.run(main)
