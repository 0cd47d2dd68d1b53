"""Mobile video networks that no wheel holds: MobileNet, ShuffleNet and SqueezeNet in 3D, and MoViNet.

The first four follow Köpüklü et al., "Resource Efficient 3D Convolutional Neural Networks" (2019); MoViNet-A0 follows
table 2 of Kondratyuk et al., "MoViNets: Mobile Video Networks for Efficient Video Recognition" (2021), for whole clips
and, with causal convolutions and their state as inputs and outputs, for streams.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def _unit(
    inputs: int, outputs: int, kernel: int, stride: int | tuple[int, ...] = 1, groups: int = 1
) -> list[nn.Module]:
    padding = kernel // 2
    return [nn.Conv3d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm3d(outputs)]


def mobilenet(classes: int = 400) -> nn.Module:
    """3D MobileNet: depthwise 3×3×3 and pointwise convolutions."""
    plan = [(64, 2), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 1), (1024, 1)]
    layers = [*_unit(3, 32, 3, (1, 2, 2)), nn.ReLU()]
    width = 32
    for outputs, stride in plan:
        layers += [*_unit(width, width, 3, stride, groups=width), nn.ReLU(), *_unit(width, outputs, 1), nn.ReLU()]
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(width, classes))


class InvertedResidual(nn.Module):
    """Expand, filter by channel, project; the input is added where its shape allows."""

    def __init__(self, inputs: int, outputs: int, stride: int | tuple[int, ...], expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*_unit(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        self.body = nn.Sequential(
            *expand, *_unit(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), *_unit(hidden, outputs, 1)
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v2(classes: int = 400) -> nn.Module:
    """3D MobileNetV2."""
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    layers: list[nn.Module] = [*_unit(3, 32, 3, (1, 2, 2)), nn.ReLU6()]
    width = 32
    for expansion, outputs, count, stride in plan:
        for index in range(count):
            layers.append(InvertedResidual(width, outputs, stride if index == 0 else 1, expansion))
            width = outputs
    layers += [*_unit(width, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(1280, classes)]
    return nn.Sequential(*layers)


def _shuffled(x: torch.Tensor, groups: int) -> torch.Tensor:
    n, c, t, h, w = x.shape
    return x.view(n, groups, c // groups, t, h, w).transpose(1, 2).reshape(n, c, t, h, w)


class ShuffleUnit(nn.Module):
    """Grouped pointwise convolutions with their channels shuffled between (ShuffleNet's unit)."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, first: bool) -> None:
        super().__init__()
        middle, self.stride, self.groups = outputs // 4, stride, groups
        made = outputs - inputs if stride == 2 else outputs
        self.squeeze = nn.Sequential(*_unit(inputs, middle, 1, groups=1 if first else groups), nn.ReLU())
        self.rest = nn.Sequential(
            *_unit(middle, middle, 3, stride, groups=middle), *_unit(middle, made, 1, groups=groups)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rest(_shuffled(self.squeeze(x), self.groups))
        if self.stride == 2:
            return F.relu(torch.cat((F.avg_pool3d(x, 3, 2, 1), y), 1))
        return F.relu(x + y)


def shufflenet(classes: int = 400, groups: int = 3) -> nn.Module:
    """3D ShuffleNet."""
    layers = [*_unit(3, 24, 3, (1, 2, 2)), nn.ReLU(), nn.MaxPool3d(3, 2, 1)]
    width = 24
    for outputs, count in ((240, 4), (480, 8), (960, 4)):
        for index in range(count):
            layers.append(ShuffleUnit(width, outputs, 2 if index == 0 else 1, groups, first=width == 24))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(width, classes))


class ShuffleUnitV2(nn.Module):
    """Half of the channels pass by, then both halves are shuffled (ShuffleNetV2's unit)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, self.stride = outputs // 2, stride
        taken = inputs if stride == 2 else inputs // 2
        self.branch = nn.Sequential(
            *_unit(taken, half, 1),
            nn.ReLU(),
            *_unit(half, half, 3, stride, groups=half),
            *_unit(half, half, 1),
            nn.ReLU(),
        )
        if stride == 2:
            self.shortcut = nn.Sequential(
                *_unit(inputs, inputs, 3, stride, groups=inputs), *_unit(inputs, half, 1), nn.ReLU()
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 2:
            return _shuffled(torch.cat((self.shortcut(x), self.branch(x)), 1), 2)
        kept, taken = x.chunk(2, dim=1)
        return _shuffled(torch.cat((kept, self.branch(taken)), 1), 2)


def shufflenet_v2(classes: int = 400) -> nn.Module:
    """3D ShuffleNetV2."""
    layers = [*_unit(3, 24, 3, (1, 2, 2)), nn.ReLU(), nn.MaxPool3d(3, 2, 1)]
    width = 24
    for outputs, count in ((116, 4), (232, 8), (464, 4)):
        for index in range(count):
            layers.append(ShuffleUnitV2(width, outputs, 2 if index == 0 else 1))
            width = outputs
    layers += [*_unit(width, 1024, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(1024, classes))


class Fire(nn.Module):
    """SqueezeNet's module with batch normalisation; where input and output have one shape they are added."""

    def __init__(self, inputs: int, squeezed: int, outputs: int, adds: bool) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(*_unit(inputs, squeezed, 1), nn.ReLU())
        self.by_one = nn.Sequential(*_unit(squeezed, outputs // 2, 1))
        self.by_three = nn.Sequential(*_unit(squeezed, outputs // 2, 3))
        self.adds = adds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = self.squeeze(x)
        y = torch.cat((self.by_one(squeezed), self.by_three(squeezed)), 1)
        return F.relu(x + y if self.adds else y)


def squeezenet(classes: int = 400) -> nn.Module:
    """3D SqueezeNet."""
    pool = nn.MaxPool3d(3, 2, 1)
    return nn.Sequential(
        *_unit(3, 64, 3, (1, 2, 2)), nn.ReLU(), pool, Fire(64, 16, 128, False), Fire(128, 16, 128, True), pool,
        Fire(128, 32, 256, False), Fire(256, 32, 256, True), pool, Fire(256, 48, 384, False), Fire(384, 48, 384, True),
        Fire(384, 64, 512, False), pool, Fire(512, 64, 512, True), nn.Conv3d(512, classes, 1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(),
    )  # fmt: skip


#: MoViNet-A0 by block: channels, then per layer the expanded channels, the kernel (t, h = w) and the spatial stride.
_A0 = (
    (8, ((24, (1, 5), 2),)),
    (32, ((80, (3, 3), 2), (80, (3, 3), 1), (80, (3, 3), 1))),
    (56, ((184, (5, 3), 2), (112, (3, 3), 1), (184, (3, 3), 1))),
    (56, ((184, (5, 3), 1), (184, (3, 3), 1), (184, (3, 3), 1), (184, (3, 3), 1))),
    (104, ((384, (5, 3), 2), (280, (1, 5), 1), (280, (1, 5), 1), (344, (1, 5), 1))),
)
_State = list[torch.Tensor]


class Stepped:
    """State by state, as layers ask for it: what came in, and what goes out. Without any, a whole clip is computed."""

    def __init__(self, states: _State | None) -> None:
        self.given, self.next = states, []

    def extended(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        """``x`` behind the last ``frames`` frames of the call before."""
        if frames == 0 or self.given is None:
            return x
        x = torch.cat((self.given[len(self.next)], x), 2)
        self.next.append(x[:, :, -frames:])
        return x

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over positions and over all frames so far."""
        if self.given is None:
            return x.mean((2, 3, 4), keepdim=True)
        total, count = self.given[len(self.next)], self.given[len(self.next) + 1]
        total, count = total + x.mean((3, 4), keepdim=True).sum(2, keepdim=True), count + x.shape[2]
        self.next += [total, count]
        return total / count


class MobileLayer(nn.Module):
    """MoViNet's layer: expand, filter by channel over space and time, squeeze and excite, project, add."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int, kernel: tuple[int, int], stride: int, causal: bool
    ) -> None:
        super().__init__()
        frames, side = kernel
        self.before = frames - 1 if causal else 0
        self.expand = nn.Sequential(*_unit(inputs, hidden, 1))
        self.filter = nn.Sequential(
            nn.Conv3d(
                hidden, hidden, (frames, side, side), (1, stride, stride),
                (0 if causal else frames // 2, side // 2, side // 2), groups=hidden, bias=False,
            ),
            nn.BatchNorm3d(hidden),
        )  # fmt: skip
        self.reduce, self.excite = nn.Conv3d(hidden, hidden // 4, 1), nn.Conv3d(hidden // 4, hidden, 1)
        self.project = nn.Sequential(*_unit(hidden, outputs, 1))
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            pool = [nn.AvgPool3d((1, stride, stride), ceil_mode=True)] if stride > 1 else []
            self.shortcut = nn.Sequential(*pool, *_unit(inputs, outputs, 1))

    def forward(self, x: torch.Tensor, steps: Stepped) -> torch.Tensor:
        y = F.hardswish(self.expand(x))
        y = F.hardswish(self.filter(steps.extended(y, self.before)))
        gate = self.excite(F.hardswish(self.reduce(steps.mean(y))))
        y = self.project(y * F.hardsigmoid(gate))
        return y + (x if self.shortcut is None else self.shortcut(x))

    def states(self, size: int, stride: int) -> _State:
        """Zeros in place of the frames before the first, for an input of ``size`` positions a side."""
        hidden = self.filter[0].in_channels
        frames = [torch.zeros(1, hidden, self.before, size, size)] if self.before else []
        return [*frames, torch.zeros(1, hidden, 1, 1, 1), torch.zeros(1)]


class MoViNet(nn.Module):
    """MoViNet-A0. With ``causal`` ``forward(clip, *states)`` returns the scores so far and the next states."""

    def __init__(self, classes: int = 600, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.stem = nn.Sequential(nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False), nn.BatchNorm3d(8))
        layers, width = [], 8
        for outputs, block in _A0:
            for hidden, kernel, stride in block:
                layers.append(MobileLayer(width, outputs, hidden, kernel, stride, causal))
                width = outputs
        self.layers = nn.ModuleList(layers)
        self.strides = [stride for _, block in _A0 for _, _, stride in block]
        self.head = nn.Sequential(*_unit(width, 480, 1))
        self.hidden, self.scores = nn.Conv3d(480, 2048, 1), nn.Conv3d(2048, classes, 1)

    def forward(self, clip: torch.Tensor, *states: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        steps = Stepped(list(states) if self.causal else None)
        x = F.hardswish(self.stem(clip))
        for layer in self.layers:
            x = layer(x, steps)
        pooled = steps.mean(F.hardswish(self.head(x)))
        scores = self.scores(F.hardswish(self.hidden(pooled))).flatten(1)
        return (scores, *steps.next) if self.causal else scores

    def first_states(self, size: int) -> _State:
        """What stands for the frames before the first of a stream of ``size`` × ``size`` positions."""
        states: _State = []
        size = (size + 1) // 2
        for layer, stride in zip(self.layers, self.strides, strict=True):
            states += layer.states(size, stride)
            size = (size + stride - 1) // stride
        return [*states, torch.zeros(1, 480, 1, 1, 1), torch.zeros(1)]
