"""Instructions that an emulated device executes, counted by a plugin of qemu and read while it runs.

The plugin adds up the instructions of every translated block as it is executed, in a file that is mapped into memory.
Processes that the device forks count into the same file; threads would lose counts, so what is counted runs on one.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

from dance_tvm.core.errors import DanceError

COMPILE_TIMEOUT_S = 120

# qemu's plugin interface, version 1 (docs/devel/tcg-plugins.rst); its header is not packaged apart from qemu's source.
PLUGIN_INTERFACE = r"""
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
typedef struct qemu_info_t qemu_info_t;
typedef void (*tb_trans_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_trans_cb);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;
"""

PLUGIN = (
    PLUGIN_INTERFACE
    + r"""
static uint64_t *executed;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, executed,
                                             qemu_plugin_tb_n_insns(block));
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    if (argc < 1 || strncmp(argv[0], "counts=", 7))
        return 1;
    int file = open(argv[0] + 7, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(uint64_t)))
        return 1;
    executed = mmap(NULL, sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (executed == MAP_FAILED)
        return 1;
    close(file);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    return 0;
}
"""
)


class InstructionCounter:
    """A file in ``folder`` into which a device started with ``options`` counts."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "instructions"
        self.options = ["-plugin", f"{build_plugin(folder)},counts={self.file}"]

    def read(self) -> int:
        """Instructions executed so far."""
        return struct.unpack("Q", self.file.read_bytes())[0]


def build_plugin(folder: Path, text: str = PLUGIN) -> Path:
    """A plugin, compiled for this machine. Raises DanceError where there is no compiler, or it fails."""
    source, library = folder / "count.c", folder / "libcount.so"
    source.write_text(text)
    compiler = [found] if (found := shutil.which("cc")) else [sys.executable, "-m", "ziglang", "cc"]
    done = subprocess.run(
        [*compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)],
        capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise DanceError(f"qemu's counting plugin does not compile: {done.stderr.strip().splitlines()[-1]}")
    return library
