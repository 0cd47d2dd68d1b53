"""The facts of a target on which the choice of kernels and their code depend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax

from dance_tvm.machines.processors import l3_bytes_per_cycle
from dance_tvm.schedules.cpu.cost import running
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
    fastest = max(target.clusters, key=lambda core: core.max_ghz * core.fma_per_cycle)
    return Machine(
        target.vector.floats,
        target.vector.registers,
        target.caches.l1d,
        target.caches.l2,
        broadcast_loads=not arm,
        l3=target.caches.l3,
        l3_gb_per_s=l3_bytes_per_cycle(fastest.mcpu) * fastest.max_ghz,
        gflops=2 * target.vector.floats * fastest.max_ghz * fastest.fma_per_cycle,
        memory_gb_per_s=target.memory_gb_per_s,
    )


def machine_for(target: Target, network: tvm.IRModule) -> Machine:
    """The same as a network finds them that runs again and again: small weights are in the caches already."""
    constants: dict[tvm.ir.GenericConst, int] = {}

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            constants[expr] = expr.value.numpy().nbytes

    for _, function in network.functions_items():
        relax.analysis.post_order_visit(function, visit)
    return running(machine_of(target), sum(constants.values()))


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
