"""Which kernels there are on each kind of machine, and which of them is asked first.

A new kernel of a convolution or linear layer is one new file and one ``register``: a function that is offered every
layer, and answers with a kernel or with None where another one should take it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dance_tvm.schedules.convolution import LayerKernel
from dance_tvm.schedules.cpu import choice as cpu
from dance_tvm.schedules.cpu import mask_window as cpu_mask_window
from dance_tvm.schedules.cpu.choice import TuningLog
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.gpu import choice as gpu
from dance_tvm.schedules.gpu import mask_window as gpu_mask_window
from dance_tvm.schedules.gpu.tiles import Gpu
from dance_tvm.schedules.kernel import Kernel
from dance_tvm.schedules.layer import Choice, Layer
from dance_tvm.schedules.mask_window import GrownMask
from dance_tvm.schedules.pool import Pool
from dance_tvm.schedules.workload import Workload

#: What is offered a layer on a machine; the algorithm is "auto", "direct" or "winograd", the log what was tuned.
Offer = Callable[[Layer, Any, str, TuningLog | None], Choice[LayerKernel] | None]
#: The same for pools: their workload and the fields that no size decides.
PoolOffer = Callable[[Workload, Mapping[str, Any], Any, TuningLog | None], Choice[Pool]]


@dataclass(frozen=True)
class Kernels:
    """The kernels of one kind of machine: ``convolutions`` are asked in order, ``of`` gives that of a workload, whose
    sizes are still to be decided."""

    convolutions: list[Offer]
    pool: PoolOffer
    grown_mask: type[GrownMask]
    of: Callable[[Workload, Any], Kernel]


_KERNELS: dict[type, Kernels] = {
    Machine: Kernels(
        [cpu.offer_planar, cpu.offer_transposed, cpu.offer_depthwise, cpu.offer_pointwise, cpu.offer],
        cpu.offer_pool,
        cpu_mask_window.GrownMask,
        cpu.kernel_of,
    ),
    Gpu: Kernels(
        [gpu.offer_few_rows, gpu.offer_few_channels, gpu.offer],
        gpu.offer_pool,
        gpu_mask_window.GrownMask,
        gpu.kernel_of,
    ),
}


def kernels_of(machine: Machine | Gpu) -> Kernels:
    """The kernels of a machine of this kind."""
    return _KERNELS[type(machine)]


def kernel_of(workload: Workload, machine: Machine | Gpu) -> Kernel:
    """The kernel of a workload's family, whose sizes are still to be decided."""
    return kernels_of(machine).of(workload, machine)


def register(kind: type[Machine] | type[Gpu], offer: Offer) -> None:
    """Let ``offer`` be asked before all others, on machines of this kind."""
    _KERNELS[kind].convolutions.insert(0, offer)


def choose(
    layer: Layer, machine: Machine | Gpu, algorithm: str = "auto", log: TuningLog | None = None
) -> Choice[LayerKernel]:
    """The kernel of a layer: the first that is offered. Raises LookupError where none is."""
    offers = (offer(layer, machine, algorithm, log) for offer in kernels_of(machine).convolutions)
    choice = next((found for found in offers if found is not None), None)
    if choice is None:
        raise LookupError(f"no kernel takes {layer}")
    return choice
