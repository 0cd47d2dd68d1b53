"""R(2+1)D (Tran et al., 2018): residual networks whose 3x3x3 convolutions are 1x3x3 followed by 3x1x1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dance_tvm.models.checkpoints import Rules
from dance_tvm.models.layers import seed_weights

# torchvision's r2plus1d_18 (and IG-65M's, which has its names): nn.Sequential inside nn.Sequential.
_TORCHVISION: Rules = (
    (r"stem\.0\.", "stem.spatial."),
    (r"stem\.1\.", "stem.bn_spatial."),
    (r"stem\.3\.", "stem.temporal."),
    (r"stem\.4\.", "bn_stem."),
    (r"(layer\d\.\d)\.conv(\d)\.0\.0\.", r"\1.conv\2.spatial."),
    (r"(layer\d\.\d)\.conv(\d)\.0\.1\.", r"\1.conv\2.bn_spatial."),
    (r"(layer\d\.\d)\.conv(\d)\.0\.3\.", r"\1.conv\2.temporal."),
    (r"(layer\d\.\d)\.conv(\d)\.1\.", r"\1.bn\2."),
    (r"(layer\d\.\d)\.downsample\.0\.", r"\1.shortcut."),
    (r"(layer\d\.\d)\.downsample\.1\.", r"\1.bn_shortcut."),
)
# OpenMMLab's ResNet2Plus1d: ConvModules (conv, bn) whose convolution is a pair (conv_s, bn_s, conv_t).
_OPENMMLAB: Rules = (
    (r"backbone\.conv1\.conv\.conv_s\.", "stem.spatial."),
    (r"backbone\.conv1\.conv\.bn_s\.", "stem.bn_spatial."),
    (r"backbone\.conv1\.conv\.conv_t\.", "stem.temporal."),
    (r"backbone\.conv1\.bn\.", "bn_stem."),
    (r"backbone\.(layer\d\.\d)\.conv(\d)\.conv\.conv_s\.", r"\1.conv\2.spatial."),
    (r"backbone\.(layer\d\.\d)\.conv(\d)\.conv\.bn_s\.", r"\1.conv\2.bn_spatial."),
    (r"backbone\.(layer\d\.\d)\.conv(\d)\.conv\.conv_t\.", r"\1.conv\2.temporal."),
    (r"backbone\.(layer\d\.\d)\.conv(\d)\.bn\.", r"\1.bn\2."),
    (r"backbone\.(layer\d\.\d)\.downsample\.conv\.", r"\1.shortcut."),
    (r"backbone\.(layer\d\.\d)\.downsample\.bn\.", r"\1.bn_shortcut."),
    (r"cls_head\.fc_cls\.", "fc."),
)


class Conv2Plus1d(nn.Module):
    """A spatial convolution, batch norm, ReLU, and a temporal convolution."""

    def __init__(
        self, inputs: int, middle: int, outputs: int, *, kernel: int = 3, stride: tuple[int, int] = (1, 1)
    ) -> None:
        """``stride`` is (in time, in space); ``kernel`` the spatial kernel's side."""
        super().__init__()
        in_time, in_space = stride
        self.spatial = nn.Conv3d(
            inputs,
            middle,
            (1, kernel, kernel),
            stride=(1, in_space, in_space),
            padding=(0, kernel // 2, kernel // 2),
            bias=False,
        )
        self.bn_spatial = nn.BatchNorm3d(middle)
        self.temporal = nn.Conv3d(middle, outputs, (3, 1, 1), stride=(in_time, 1, 1), padding=(1, 0, 0), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.temporal(F.relu(self.bn_spatial(self.spatial(x))))


class ResidualBlock(nn.Module):
    """Two factorised convolutions and a shortcut, which is a 1x1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        # As many weights as the 3x3x3 convolution that the pair stands for (section 3.5 of the paper).
        middle = inputs * outputs * 27 // (inputs * 9 + 3 * outputs)
        self.conv1 = Conv2Plus1d(inputs, middle, outputs, stride=(stride, stride))
        self.bn1 = nn.BatchNorm3d(outputs)
        self.conv2 = Conv2Plus1d(outputs, middle, outputs)
        self.bn2 = nn.BatchNorm3d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        self.bn_shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv3d(inputs, outputs, 1, stride=stride, bias=False)
            self.bn_shortcut = nn.BatchNorm3d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.bn_shortcut(self.shortcut(x)))


class R2Plus1d(nn.Module):
    """Class scores (N, num_classes) of clips (N, C, T, H, W)."""

    checkpoint_rules = _TORCHVISION + _OPENMMLAB

    def __init__(
        self, stem: Conv2Plus1d, widths: Sequence[int], depths: Sequence[int], num_classes: int, first_stride: int = 1
    ) -> None:
        """``widths`` and ``depths`` are channels and blocks of each stage; later stages halve T, H and W."""
        super().__init__()
        self.stem = stem
        self.bn_stem = nn.BatchNorm3d(widths[0])
        before = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            stride = first_stride if stage == 1 else 2
            blocks = [ResidualBlock(before if i == 0 else width, width, stride if i == 0 else 1) for i in range(depth)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            before = width
        self.stages = len(widths)
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(before, num_classes)
        seed_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_stem(self.stem(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(torch.flatten(self.pool(x), 1))


def r2plus1d_18(num_classes: int = 400, in_channels: int = 3) -> R2Plus1d:
    """R(2+1)D-18 for clips (N, 3, 16, 112, 112): 31.5 M parameters, 40.5 G multiply-accumulates a clip."""
    stem = Conv2Plus1d(in_channels, 45, 64, kernel=7, stride=(1, 2))
    return R2Plus1d(stem, (64, 128, 256, 512), (2, 2, 2, 2), num_classes)


def r2plus1d_mini(num_classes: int = 10, in_channels: int = 1) -> R2Plus1d:
    """One block a stage, 16 to 128 channels, for small clips (N, in_channels, 16, 32, 32); 0.9 M parameters."""
    stem = Conv2Plus1d(in_channels, 12, 16, kernel=3, stride=(1, 1))
    return R2Plus1d(stem, (16, 32, 64, 128), (1, 1, 1, 1), num_classes)
