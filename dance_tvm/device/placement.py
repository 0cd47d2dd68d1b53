"""Where a network's tensors live: the processor, or the GPU that it was built for; and what GPUs say when they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dance_tvm.artifact.folder import Manifest
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.gpu import cuda_of_ptx


def compute_device(manifest: Manifest, make: Callable[[str, int], Any], where: str) -> Any:
    """The device that runs ``manifest``'s network; ``make`` gives TVM's device of a kind and number.

    Raises DanceError where the network is for a GPU that ``where`` has not, or that its TVM runtime cannot reach.
    """
    kind = str(manifest.target.tvm["kind"])
    if kind == "llvm":
        return make("cpu", 0)
    device = make(kind, 0)
    if not device.exist:
        raise DanceError(
            f"{manifest.name} is built for {manifest.target.name} and {where} has no {kind} device, or its TVM runtime "
            f"was built without {kind}: open a device that has one (docs/jetson.md), or rebuild for a CPU target"
        )
    return device


@contextmanager
def gpu_failures_explained(manifest: Manifest, where: str) -> Iterator[None]:
    """Turn what a GPU's driver says inside the block into one sentence, where it is one of the known things."""
    try:
        yield
    except DanceError as error:
        _explain(manifest, where, str(error))
        raise
    except Exception as error:  # TVM raises many kinds
        _explain(manifest, where, str(error))
        raise


def _explain(manifest: Manifest, where: str, said: str) -> None:
    code = manifest.device_code
    if "UNSUPPORTED_PTX_VERSION" in said and code is not None:
        raise DanceError(
            f"the driver of {where} is too old for {manifest.name}: it holds PTX {code.version}, which needs a driver "
            f"for CUDA {cuda_of_ptx(code.version)} or newer; update it, or rebuild for a target with an older PTX"
        ) from None
    if any(sign in said for sign in ("OUT_OF_MEMORY", "out of memory", "MEM_OBJECT_ALLOCATION_FAILURE")):
        needs = manifest.memory_peak_bytes / 2**20
        raise DanceError(
            f"{where} is out of device memory: {manifest.name} needs {needs:.0f} MiB in a call; "
            f"free some, or build with a smaller batch"
        ) from None
