"""A trained D-STEP network as a .pt2 file, whole clips or streaming."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from dance_tvm.sparsity.checkpoint import write_atomically
from dance_tvm.sparsity.dstep.network import DStepResNet, Stream


def export_network(
    network: DStepResNet, clip_shape: tuple[int, int, int, int], path: Path, *, stream: bool = False
) -> None:
    """Writes `network` for clips of shape (C, T, H, W), or its streaming form for frames (C, H, W) of them."""
    channels, frames, height, width = clip_shape
    module: torch.nn.Module = network.eval()
    inputs: tuple[torch.Tensor, ...] = (torch.zeros(1, channels, frames, height, width),)
    if stream:
        module = streaming = Stream(network, (channels, height, width)).eval()
        inputs = (torch.zeros(1, channels, height, width), *streaming.start())
    content = io.BytesIO()
    torch.export.save(torch.export.export(module, inputs), content)
    write_atomically(path, content.getvalue())
