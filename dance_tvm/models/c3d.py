"""C3D (Tran et al., 2015): eight 3x3x3 convolutions, five poolings, three linear layers; and its small sister."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dance_tvm.models.checkpoints import Rules
from dance_tvm.models.layers import seed_weights

# The Caffe model's usual port as two nn.Sequential (features, classifier), counted with ReLUs, poolings and dropouts;
# the names of the other usual port (conv1 ... fc8) are ours.
_SEQUENTIAL_PORT: Rules = (
    (r"features\.0\.", "conv1."),
    (r"features\.3\.", "conv2."),
    (r"features\.6\.", "conv3a."),
    (r"features\.8\.", "conv3b."),
    (r"features\.11\.", "conv4a."),
    (r"features\.13\.", "conv4b."),
    (r"features\.16\.", "conv5a."),
    (r"features\.18\.", "conv5b."),
    (r"classifier\.0\.", "fc6."),
    (r"classifier\.3\.", "fc7."),
    (r"classifier\.6\.", "fc8."),
)
# OpenMMLab's recognizer: a backbone of ConvModules and a head.
_OPENMMLAB: Rules = (
    (r"backbone\.conv([12])a\.conv\.", r"conv\1."),
    (r"backbone\.conv([345][ab])\.conv\.", r"conv\1."),
    (r"backbone\.(fc[67])\.", r"\1."),
    (r"cls_head\.fc_cls\.", "fc8."),
)


class C3D(nn.Module):
    """Class scores (N, num_classes) of clips (N, 3, 16, 112, 112); 38.5 G multiply-accumulates a clip."""

    checkpoint_rules = _SEQUENTIAL_PORT + _OPENMMLAB

    def __init__(self, num_classes: int = 487, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, 64, 3, padding=1)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2 = nn.Conv3d(64, 128, 3, padding=1)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3a = nn.Conv3d(128, 256, 3, padding=1)
        self.conv3b = nn.Conv3d(256, 256, 3, padding=1)
        self.pool3 = nn.MaxPool3d(2)
        self.conv4a = nn.Conv3d(256, 512, 3, padding=1)
        self.conv4b = nn.Conv3d(512, 512, 3, padding=1)
        self.pool4 = nn.MaxPool3d(2)
        self.conv5a = nn.Conv3d(512, 512, 3, padding=1)
        self.conv5b = nn.Conv3d(512, 512, 3, padding=1)
        self.pool5 = nn.MaxPool3d(2, padding=(0, 1, 1))
        self.fc6 = nn.Linear(8192, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.dropout = nn.Dropout(0.5)
        seed_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.pool2(F.relu(self.conv2(x)))
        x = F.relu(self.conv3a(x))
        x = self.pool3(F.relu(self.conv3b(x)))
        x = F.relu(self.conv4a(x))
        x = self.pool4(F.relu(self.conv4b(x)))
        x = F.relu(self.conv5a(x))
        x = self.pool5(F.relu(self.conv5b(x)))
        x = torch.flatten(x, 1)
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.dropout(F.relu(self.fc7(x)))
        return self.fc8(x)


class C3DMini(nn.Module):
    """Class scores (N, num_classes) of small clips (N, in_channels, T, H, W), by default (N, 1, 16, 32, 32).

    C3D's plan with six convolutions of 16 to 128 channels, batch norm, and global average pooling for its linear
    layers, so that any T >= 4 and H, W >= 8 is accepted; 0.84 M parameters.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(16)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2 = nn.Conv3d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(32)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3a = nn.Conv3d(32, 64, 3, padding=1, bias=False)
        self.bn3a = nn.BatchNorm3d(64)
        self.conv3b = nn.Conv3d(64, 64, 3, padding=1, bias=False)
        self.bn3b = nn.BatchNorm3d(64)
        self.pool3 = nn.MaxPool3d(2)
        self.conv4a = nn.Conv3d(64, 128, 3, padding=1, bias=False)
        self.bn4a = nn.BatchNorm3d(128)
        self.conv4b = nn.Conv3d(128, 128, 3, padding=1, bias=False)
        self.bn4b = nn.BatchNorm3d(128)
        self.pool4 = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(128, num_classes)
        seed_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(F.relu(self.bn1(self.conv1(x))))
        x = self.pool2(F.relu(self.bn2(self.conv2(x))))
        x = F.relu(self.bn3a(self.conv3a(x)))
        x = self.pool3(F.relu(self.bn3b(self.conv3b(x))))
        x = F.relu(self.bn4a(self.conv4a(x)))
        x = self.pool4(F.relu(self.bn4b(self.conv4b(x))))
        return self.fc(torch.flatten(x, 1))
