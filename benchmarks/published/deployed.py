"""Published networks that one call of their library does not make."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.published.networks import declare_torchvision


def efficient_x3d_xs() -> nn.Module:
    """pytorchvideo's X3D-XS for phones, converted by its own accelerator for one input size."""
    declare_torchvision()
    from pytorchvideo.accelerator.deployment.mobile_cpu.utils.model_conversion import convert_to_deployable_form
    from pytorchvideo.models.hub import efficient_x3d_xs as create

    return convert_to_deployable_form(create().eval(), torch.randn(1, 3, 4, 160, 160))


def mvit(name: str, frames: int, side: int) -> nn.Module:
    """torchvision's MViT for smaller clips; its own functions fix their size."""
    declare_torchvision()
    from torchvision.models.video import mvit as module

    def smaller(**options: Any) -> nn.Module:
        return whole(**{**options, "temporal_size": frames, "spatial_size": (side, side)})

    whole = module.MViT
    with mock.patch.object(module, "MViT", smaller):
        return getattr(module, name)()


class TwoPaths(nn.Module):
    """SlowFast as a function of two clips; pytorchvideo takes a list."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, slow: torch.Tensor, fast: torch.Tensor) -> torch.Tensor:
        return self.network([slow, fast])


def slowfast(depth: int, frames: int = 8, side: int = 64) -> nn.Module:
    """pytorchvideo's SlowFast of 50 or 101 layers, its last pools as large as the clip needs."""
    declare_torchvision()
    from pytorchvideo.models.slowfast import create_slowfast

    pools = ((frames // 4, side // 32, side // 32), (frames, side // 32, side // 32))
    kernel = (7, 1, 1) if depth == 50 else (5, 1, 1)
    return TwoPaths(
        create_slowfast(model_depth=depth, slowfast_fusion_conv_kernel_size=kernel, head_pool_kernel_sizes=pools)
    )


class Logits(nn.Module):
    """A network of transformers as a function from clip to scores."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values=clip).logits


def timesformer(**options: Any) -> nn.Module:
    """TimeSformer with divided space-time attention."""
    declare_torchvision()
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    return Logits(TimesformerForVideoClassification(TimesformerConfig(**options)))


def videomae(**options: Any) -> nn.Module:
    """VideoMAE as a classifier."""
    declare_torchvision()
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    return Logits(VideoMAEForVideoClassification(VideoMAEConfig(**options)))
