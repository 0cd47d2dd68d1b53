"""The facts of a target on which the choice of kernels and their code depend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.gpu.tiles import Gpu

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target


#: TVM's configuration for kernels and what launches them: they leave their arguments unchecked. An artifact checks what
#: it is given at its interface; behind it, types and shapes are the compiler's own. The checks would be half of the
#: code of a small kernel, and more than its work: a network has dozens of planners.
UNCHECKED: dict[str, Any] = {"tirx.disable_assert": True}


def machine_of(target: Target) -> Machine:
    """The facts of a processor on which tile sizes depend."""
    arm = "aarch64" in str(target.tvm.get("mtriple", "")) or (target.host is None and "neon" in str(target.tvm))
    cores = [core.max_ghz * core.fma_per_cycle for core in target.clusters]
    return Machine(
        target.vector.floats,
        target.vector.registers,
        target.caches.l1d,
        target.caches.l2,
        broadcast_loads=not arm,
        l3=target.caches.l3,
        gflops=2 * target.vector.floats * max(cores),
        memory_gb_per_s=target.memory_gb_per_s,
    )


def gpu_of(target: Target) -> Gpu | None:
    """The facts of a GPU on which tile sizes depend; None for a CPU."""
    facts = target.gpu
    if facts is None:
        return None
    return Gpu(
        facts.units,
        facts.warp,
        facts.unit_threads,
        facts.block_threads,
        facts.registers,
        facts.block_registers,
        facts.shared,
        facts.block_shared,
    )
