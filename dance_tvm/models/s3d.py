"""S3D (Xie et al., 2018): Inception whose 3x3x3 convolutions are 1x3x3 followed by 3x1x1."""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from dance_tvm.models.checkpoints import Rules
from dance_tvm.models.layers import seed_weights

# Both public ports count the trunk's layers alike, poolings included: one calls it `features`, the other `base`.
_TRUNK = {
    0: "stem",
    2: "conv2",
    3: "conv3",
    5: "mixed3b",
    6: "mixed3c",
    8: "mixed4b",
    9: "mixed4c",
    10: "mixed4d",
    11: "mixed4e",
    12: "mixed4f",
    14: "mixed5b",
    15: "mixed5c",
}
_PLAIN = ("conv2",)
_SEPARABLE = ("stem", "conv3")


def _torchvision_rules() -> Rules:
    rules: list[tuple[str, str]] = [(r"classifier\.1\.", "fc.")]
    for index, name in _TRUNK.items():
        at = rf"features\.{index}\."
        if name in _PLAIN:
            rules += [(at + r"0\.", f"{name}.conv."), (at + r"1\.", f"{name}.bn.")]
        elif name in _SEPARABLE:
            rules += _torchvision_pair(at, f"{name}.")
        else:
            rules += [(at + r"branch0\.0\.", f"{name}.branch0.conv."), (at + r"branch0\.1\.", f"{name}.branch0.bn.")]
            for branch in (1, 2):
                inner = rf"{at}branch{branch}\."
                rules += [
                    (inner + r"0\.0\.", f"{name}.reduce{branch}.conv."),
                    (inner + r"0\.1\.", f"{name}.reduce{branch}.bn."),
                ]
                rules += _torchvision_pair(inner + r"1\.", f"{name}.branch{branch}.")
            rules += [
                (at + r"branch3\.1\.0\.", f"{name}.branch3.conv."),
                (at + r"branch3\.1\.1\.", f"{name}.branch3.bn."),
            ]
    return tuple(rules)


def _torchvision_pair(at: str, name: str) -> list[tuple[str, str]]:
    return [
        (at + r"0\.0\.", name + "spatial."),
        (at + r"0\.1\.", name + "bn_spatial."),
        (at + r"1\.0\.", name + "temporal."),
        (at + r"1\.1\.", name + "bn_temporal."),
    ]


def _kinetics_rules() -> Rules:
    """The port that published the Kinetics weights: `base.N`, layers called conv / conv_s / conv_t."""
    rules: list[tuple[str, str]] = [(r"fc\.0\.", "fc.")]
    for index, name in _TRUNK.items():
        at = rf"base\.{index}\."
        if name not in _PLAIN + _SEPARABLE:
            for branch in (1, 2):
                rules += [(rf"{at}branch{branch}\.0\.", f"{name}.reduce{branch}.")]
                rules += _kinetics_pair(rf"{at}branch{branch}\.1\.", f"{name}.branch{branch}.")
            rules += [(at + r"branch0\.0\.", f"{name}.branch0."), (at + r"branch3\.1\.", f"{name}.branch3.")]
        elif name in _SEPARABLE:
            rules += _kinetics_pair(at, f"{name}.")
        else:
            rules += [(at, f"{name}.")]
    return tuple(rules)


def _kinetics_pair(at: str, name: str) -> list[tuple[str, str]]:
    return [
        (at + r"conv_s\.", name + "spatial."),
        (at + r"bn_s\.", name + "bn_spatial."),
        (at + r"conv_t\.", name + "temporal."),
        (at + r"bn_t\.", name + "bn_temporal."),
    ]


def _bn(channels: int) -> nn.BatchNorm3d:
    return nn.BatchNorm3d(channels, eps=1e-3)


class ConvBnRelu(nn.Module):
    """A 1x1x1 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 1, bias=False)
        self.bn = _bn(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class SeparableConv(nn.Module):
    """A spatial and a temporal convolution, each with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        pad = kernel // 2
        self.spatial = nn.Conv3d(
            inputs, outputs, (1, kernel, kernel), stride=(1, stride, stride), padding=(0, pad, pad), bias=False
        )
        self.bn_spatial = _bn(outputs)
        self.temporal = nn.Conv3d(
            outputs, outputs, (kernel, 1, 1), stride=(stride, 1, 1), padding=(pad, 0, 0), bias=False
        )
        self.bn_temporal = _bn(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_spatial(self.spatial(x)))
        return F.relu(self.bn_temporal(self.temporal(x)))


class SeparableInception(nn.Module):
    """Four towers side by side: 1x1x1; 1x1x1 then separable, twice; pooling then 1x1x1."""

    def __init__(self, inputs: int, plain: int, first: tuple[int, int], second: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.branch0 = ConvBnRelu(inputs, plain)
        self.reduce1 = ConvBnRelu(inputs, first[0])
        self.branch1 = SeparableConv(*first)
        self.reduce2 = ConvBnRelu(inputs, second[0])
        self.branch2 = SeparableConv(*second)
        self.pool3 = nn.MaxPool3d(3, stride=1, padding=1)
        self.branch3 = ConvBnRelu(inputs, pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        towers = (
            self.branch0(x),
            self.branch1(self.reduce1(x)),
            self.branch2(self.reduce2(x)),
            self.branch3(self.pool3(x)),
        )
        return torch.cat(towers, 1)


class S3D(nn.Module):
    """Class scores (N, num_classes) of clips (N, 3, T, H, W), T at least 16 and H, W at least 32."""

    checkpoint_rules = _torchvision_rules() + _kinetics_rules()

    def __init__(self, num_classes: int = 400, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = SeparableConv(in_channels, 64, 7, 2)
        self.pool1 = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.conv2 = ConvBnRelu(64, 64)
        self.conv3 = SeparableConv(64, 192)
        self.pool2 = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.mixed3b = SeparableInception(192, 64, (96, 128), (16, 32), 32)
        self.mixed3c = SeparableInception(256, 128, (128, 192), (32, 96), 64)
        self.pool3 = nn.MaxPool3d(3, stride=2, padding=1)
        self.mixed4b = SeparableInception(480, 192, (96, 208), (16, 48), 64)
        self.mixed4c = SeparableInception(512, 160, (112, 224), (24, 64), 64)
        self.mixed4d = SeparableInception(512, 128, (128, 256), (24, 64), 64)
        self.mixed4e = SeparableInception(512, 112, (144, 288), (32, 64), 64)
        self.mixed4f = SeparableInception(528, 256, (160, 320), (32, 128), 128)
        self.pool4 = nn.MaxPool3d(2)
        self.mixed5b = SeparableInception(832, 256, (160, 320), (32, 128), 128)
        self.mixed5c = SeparableInception(832, 384, (192, 384), (48, 128), 128)
        self.fc = nn.Conv3d(1024, num_classes, 1)
        seed_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(self.stem(x))
        x = self.pool2(self.conv3(self.conv2(x)))
        x = self.pool3(self.mixed3c(self.mixed3b(x)))
        x = self.mixed4f(self.mixed4e(self.mixed4d(self.mixed4c(self.mixed4b(x)))))
        x = self.mixed5c(self.mixed5b(self.pool4(x)))
        return self.fc(_pool_pairs(x)).mean((2, 3, 4))


@torch.fx.wrap  # its window depends on the clip's length, which torch.fx cannot trace
def _pool_pairs(x: torch.Tensor) -> torch.Tensor:
    """Windows of two frames and the whole picture, whose scores are then averaged, as the published network does."""
    return F.avg_pool3d(x, (min(2, x.shape[2]), x.shape[3], x.shape[4]), stride=1)
