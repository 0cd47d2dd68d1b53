"""Predicted cycles of whole networks on Arm cores: blocks counted in emulation, each through LLVM's scheduling models.

    python -m benchmarks.arm_cycles                                  float32 beside float16, and instructions
    python -m benchmarks.arm_cycles --only c3d-mini --json FILE
    python -m benchmarks.arm_cycles --repetitions 1                  the other bound: no block overlaps with the next

A plugin of qemu keeps the machine code of each translated block and how often it is executed; one call is what two
calls execute more than one. Blocks that follow each other in memory and are executed equally often are joined, and
`llvm-mca` of LLVM 19 predicts the cycles of a hundred repetitions of each. What is predicted is a core that waits for
no memory: every load hits the first-level cache, every branch is foreseen, and the repetitions of a block overlap with
each other as far as the model's buffers reach, but with no other block. The rarest blocks, 0.5 % of instructions, count
as the average of the others. Needs the emulated device (`dance-tvm doctor`); X3D-XS needs pytorchvideo.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dance_tvm.artifact.folder import Artifact
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import prepare_emulator
from dance_tvm.device.emulator import prepare, python_command
from dance_tvm.device.instruction_counter import PLUGIN_INTERFACE, build_plugin

from .arm_model import BUILDS, PROCESSORS, Conv, Dtype, named_network
from .c_windows import CROSS, compiled
from .instructions import run_emulated

#: Of the instructions of a call, how many are in blocks that the models are asked about.
MODELLED = 0.995
#: Bytes of an aarch64 instruction.
WIDTH = 4
#: How many blocks the plugin has room for.
ROOM = 1 << 20

# A record of BLOCKS is address, instructions and machine code; the counter of record i is the i-th number of COUNTS.
PLUGIN = (
    PLUGIN_INTERFACE
    + f"enum {{ ROOM = {ROOM} }};"
    + r"""
#include <stdio.h>
#include <stdlib.h>
struct qemu_plugin_insn;
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
static uint64_t *counts, known;
static FILE *blocks;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    uint64_t head[2] = {qemu_plugin_tb_vaddr(block), qemu_plugin_tb_n_insns(block)};
    if (known == ROOM) abort();
    fwrite(head, sizeof head, 1, blocks);
    for (size_t each = 0; each < head[1]; each++)
        fwrite(qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, each)), 4, 1, blocks);
    fflush(blocks);
    qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, counts + known++, 1);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    char place[4096];
    if (argc < 1 || strncmp(argv[0], "folder=", 7))
        return 1;
    snprintf(place, sizeof place, "%s/blocks", argv[0] + 7);
    blocks = fopen(place, "wb");
    snprintf(place, sizeof place, "%s/counts", argv[0] + 7);
    int file = open(place, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (!blocks || file < 0 || ftruncate(file, ROOM * sizeof(uint64_t)))
        return 1;
    counts = mmap(NULL, ROOM * sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (counts == MAP_FAILED)
        return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    return 0;
}
"""
)


@dataclass(frozen=True)
class Block:
    """Machine code at an address, executed from its first instruction to its last."""

    address: int
    code: bytes

    @property
    def instructions(self) -> int:
        """How many it has."""
        return len(self.code) // WIDTH


@dataclass(frozen=True)
class Tools:
    """LLVM's programs, and how often the models repeat each block."""

    mca: str = "llvm-mca-19"
    mc: str = "llvm-mc-19"
    repetitions: int = 100


@dataclass(frozen=True)
class Prediction:
    """One call: instructions that were counted, and predicted cycles by scheduling model."""

    instructions: int
    cycles: dict[str, float]


def blocks_of(artifact: Artifact) -> Counter[Block]:
    """How often one call executes each block, of an artifact built for aarch64 that runs on one thread."""
    *qemu, _python = python_command(prepare(lambda _sentence: None))
    arrays = random_inputs(artifact.manifest.inputs)
    inputs = b"".join(arrays[each.name].tobytes() for each in artifact.manifest.inputs)
    found: list[Counter[Block]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program, plugin = compiled(CROSS, folder), build_plugin(folder, PLUGIN)
        for calls in (1, 2):
            place = folder / "inputs.bin"
            place.write_bytes(calls * inputs)
            command = [*qemu, *program, artifact.path, place, folder / "outputs.bin", 1]
            run_emulated(["-plugin", f"{plugin},folder={folder}"], command)
            found.append(Counter())
            for block, count in _recorded(folder):
                found[-1][block] += count
    return one_call(*found)


def one_call(once: Counter[Block], twice: Counter[Block]) -> Counter[Block]:
    """What the second of two calls executed. Raises DanceError where the runs laid their code at different addresses.

    Starting a program differs by some instructions from run to run.
    """
    found = twice - once
    if instructions_of(once - twice) > (1 - MODELLED) / 5 * instructions_of(found):
        raise DanceError("two calls execute blocks less often than one: the runs cannot be compared, run them again")
    return found


def instructions_of(counts: Mapping[Block, int]) -> int:
    """Instructions of blocks executed so many times."""
    return sum(block.instructions * count for block, count in counts.items())


def _recorded(folder: Path) -> Iterator[tuple[Block, int]]:
    """What the plugin wrote: a block may be there more than once, translated anew."""
    records, at = (folder / "blocks").read_bytes(), 0
    for (count,) in struct.iter_unpack("Q", (folder / "counts").read_bytes()):
        if at == len(records):
            return
        address, size = struct.unpack_from("QQ", records, at)
        at += 16
        yield Block(address, records[at : at + WIDTH * size]), count
        at += WIDTH * size


def joined(counts: Mapping[Block, int]) -> Counter[bytes]:
    """How often each stretch of code is executed: blocks that touch and are executed equally often are one.

    The emulator ends a block where a page ends and at every branch, one that is never taken also.
    """
    found: Counter[bytes] = Counter()
    code, end, times = b"", 0, 0
    for block, count in sorted(counts.items(), key=lambda each: each[0].address):
        if block.address == end and count == times:
            code += block.code
        else:
            found[code] += times
            code, times = block.code, count
        end = block.address + len(block.code)
    found[code] += times
    return +found


def predict(counts: Mapping[Block, int], tools: Tools) -> Prediction:
    """Cycles that the models expect of blocks executed so many times. Raises DanceError where a tool fails."""
    total = instructions_of(counts)
    stretches = sorted(joined(counts).items(), key=lambda each: len(each[0]) * each[1], reverse=True)
    chosen: list[tuple[bytes, int]] = []
    covered = 0
    for code, times in stretches:
        if covered >= MODELLED * total:
            break
        chosen.append((code, times))
        covered += len(code) // WIDTH * times
    regions = "".join(
        f"# LLVM-MCA-BEGIN {index}\n{assembly}# LLVM-MCA-END\n"
        for index, assembly in enumerate(disassembled([code for code, _ in chosen], tools.mc))
    )
    weights = [times for _, times in chosen]
    cycles = {
        model: sum(one * times for one, times in zip(_cycles(regions, model, tools), weights, strict=True))
        for model in PROCESSORS
    }
    return Prediction(total, {model: found * total / covered for model, found in cycles.items()})


def disassembled(codes: Sequence[bytes], mc: str) -> list[str]:
    """The assembly of each piece of machine code."""
    words = [code[at : at + WIDTH] for code in codes for at in range(0, len(code), WIDTH)]
    text = "".join(" ".join(f"0x{byte:02x}" for byte in word) + "\n" for word in words)
    told = _tool([mc, "-disassemble", "-triple=aarch64", "-mattr=+all"], text)
    lines = [line for line in told.splitlines() if line.strip() not in {"", ".text"}]
    if len(lines) != len(words):
        raise DanceError(f"{mc} does not know an instruction that was executed")
    rest = iter(lines)
    return ["".join(f"{next(rest)}\n" for _ in range(len(code) // WIDTH)) for code in codes]


def _cycles(regions: str, model: str, tools: Tools) -> list[float]:
    """Cycles of one repetition of each region."""
    options = ["-mtriple=aarch64", f"-mcpu={model}", "-mattr=+fullfp16", f"-iterations={tools.repetitions}", "-json"]
    told = json.loads(_tool([tools.mca, *options], regions))
    found = {int(each["Name"]): each["SummaryView"]["TotalCycles"] / tools.repetitions for each in told["CodeRegions"]}
    return [found[index] for index in range(len(found))]


def _tool(command: Sequence[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise DanceError(f"{command[0]} fails: {(done.stderr.strip().splitlines() or ['no output'])[0]}")
    return done.stdout


def predicted(name: str, dtype: Dtype, conv: Conv, target: str, tools: Tools) -> Prediction:
    """Of one call of a network, built now, on random inputs."""
    network, inputs = named_network(name)
    options = Options(threads=1, dtype=dtype, conv=conv)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "network"
        built = build_network(network, place, target=target, example_inputs=inputs, options=options, check=False)
        return predict(blocks_of(built.artifact), tools)


def main(
    only: Annotated[str, typer.Option(help="comma-separated names")] = "c3d-mini,MobileNet 3D,x3d_xs",
    target: Annotated[str, typer.Option(help="what to build for; aarch64")] = "snapdragon",
    mca: Annotated[str, typer.Option(help="llvm-mca of LLVM 19 or newer")] = Tools.mca,
    mc: Annotated[str, typer.Option(help="llvm-mc of the same")] = Tools.mc,
    repetitions: Annotated[int, typer.Option(min=1, help="of each block, in the models")] = Tools.repetitions,
    out: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Print predicted cycles of one call of each network, by type and convolution, and the instructions counted."""
    for tool in (mca, mc):
        if shutil.which(tool) is None:
            raise typer.BadParameter(f"there is no {tool}: install LLVM's tools, or name it with --mca and --mc")
    prepare_emulator()
    heads = (f"predicted M cycles, {model} ({of})" for model, (of, _) in PROCESSORS.items())
    table, rows = Table("network", "build", "M instructions", *heads), []
    for name in only.split(","):
        first: Prediction | None = None
        for dtype, conv in BUILDS:
            found = predicted(name, dtype, conv, target, Tools(mca, mc, repetitions))
            first = first or found
            pairs = [(found.instructions, first.instructions)]
            pairs += [(found.cycles[model], first.cycles[model]) for model in PROCESSORS]
            table.add_row(name, f"{dtype}, {conv}", *(f"{one / 1e6:.2f} ({one / of:.2f})" for one, of in pairs))
            cycles = {model: round(each) for model, each in found.cycles.items()}
            figures = {"instructions": found.instructions, "predicted_cycles": cycles}
            rows.append({"network": name, "dtype": dtype, "conv": conv, **figures})
            typer.echo(str(rows[-1]), err=True)
            if out is not None:
                out.write_text(
                    json.dumps({"target": target, "threads": 1, "repetitions": repetitions, "rows": rows}, indent=1)
                    + "\n",
                    "utf-8",
                )
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
