"""Lightning Fabric for a run: device, precision, and this process among those that torchrun started together."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.optimization import half_precision
from dance_tvm.sparsity.settings import Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_PRECISIONS = {None: "32-true", torch.float16: "16-mixed", torch.bfloat16: "bf16-mixed"}


@contextmanager
def fabric_of_run(settings: Settings) -> Iterator[Fabric]:
    """What places modules and adds gradients up; its process group, where torchrun started several, ends with it.

    Raises DanceError where Lightning Fabric is not installed.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError as error:
        raise DanceError(f"training needs {error.name}: pip install 'dance-tvm[train]'") from None
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    count, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    precision: Any = _PRECISIONS[half_precision(settings, torch.device(kind))]
    fabric = Fabric(
        accelerator=kind,
        devices=here,
        num_nodes=count // here,
        # A method may leave parameters without a gradient in a step.
        strategy=DDPStrategy(find_unused_parameters=True) if count > 1 else "auto",
        precision=precision,
    )
    fabric.launch()
    try:
        yield fabric
    finally:
        if count > 1 and distributed.is_initialized():
            # Whatever adds gradients up must be gone before the group: as its last owner it would wait for the group's
            # threads while it keeps them from Python's lock.
            gc.collect()
            distributed.destroy_process_group()
