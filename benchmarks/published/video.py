"""Video networks that no wheel holds: temporal shift and segments over 2D networks, I3D, deeper R(2+1)D, rPPG.

TSM: Lin et al. (2019), whose online code shifts in place; TSN: Wang et al. (2016); I3D: Carreira and Zisserman (2017).
The rPPG networks are written after their papers: PhysNet (Yu et al., 2019), DeepPhys (Chen and McDuff, 2018), TS-CAN
(Liu et al., 2020), EfficientPhys (Liu et al., 2023), sizes as rPPG-Toolbox trains them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.published.networks import declare_torchvision


def shifted(x: torch.Tensor, frames: int, folds: int = 8) -> torch.Tensor:
    """An eighth of the channels of ``(N T, C, H, W)`` from the next frame, an eighth from the one before."""
    clips = x.view(-1, frames, *x.shape[1:])
    fold = x.shape[1] // folds
    out = torch.zeros_like(clips)
    out[:, :-1, :fold] = clips[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    return out.view_as(x)


def shifted_in_place(x: torch.Tensor, frames: int, folds: int = 8) -> torch.Tensor:
    """The same, written into ``x`` itself, as TSM's own in-place form does."""
    clips = x.view(-1, frames, *x.shape[1:])
    fold = x.shape[1] // folds
    buffer = clips.new_zeros(clips[:, :, :fold].shape)
    buffer[:, :-1] = clips[:, 1:, :fold]
    clips[:, :, :fold] = buffer
    buffer = clips.new_zeros(buffer.shape)
    buffer[:, 1:] = clips[:, :-1, fold : 2 * fold]
    clips[:, :, fold : 2 * fold] = buffer
    return x


class Shift(nn.Module):
    """A convolution behind a temporal shift."""

    def __init__(self, convolution: nn.Module, frames: int, in_place: bool) -> None:
        super().__init__()
        self.convolution, self.frames, self.in_place = convolution, frames, in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = shifted_in_place if self.in_place else shifted
        return self.convolution(shift(x.clone() if self.in_place else x, self.frames))


class OnFrames(nn.Module):
    """A 2D network on each frame of ``(N, T, C, H, W)``; the scores' mean (a temporal segment network)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        n, t = clip.shape[:2]
        return self.backbone(clip.flatten(0, 1)).view(n, t, -1).mean(1)


def tsn(backbone: str) -> nn.Module:
    """timm's network on frames."""
    declare_torchvision()
    import timm

    return OnFrames(timm.create_model(backbone, pretrained=False, num_classes=400))


def tsm(backbone: str, frames: int, in_place: bool = False) -> nn.Module:
    """The same with a shift before the first convolution of each residual block."""
    network = tsn(backbone)
    for module in list(network.modules()):
        blocks = ("BasicBlock", "Bottleneck", "InvertedResidual")
        first = "conv1" if hasattr(module, "conv1") else "conv_pw"
        if type(module).__name__ in blocks and hasattr(module, first):
            setattr(module, first, Shift(getattr(module, first), frames, in_place))
    return network


def _unit(inputs: int, outputs: int, kernel: int | tuple[int, ...], stride: int | tuple[int, ...] = 1) -> nn.Sequential:
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    padding = tuple(size // 2 for size in kernel)
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm3d(outputs, 1e-3), nn.ReLU()
    )


class Inception(nn.Module):
    """I3D's module: four branches over one input."""

    def __init__(self, inputs: int, a: int, b: tuple[int, int], c: tuple[int, int], d: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                _unit(inputs, a, 1),
                nn.Sequential(_unit(inputs, b[0], 1), _unit(b[0], b[1], 3)),
                nn.Sequential(_unit(inputs, c[0], 1), _unit(c[0], c[1], 3)),
                nn.Sequential(nn.MaxPool3d(3, 1, 1), _unit(inputs, d, 1)),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def i3d(classes: int = 400) -> nn.Module:
    """I3D: Inception v1 inflated."""
    return nn.Sequential(
        _unit(3, 64, 7, 2), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), _unit(64, 64, 1), _unit(64, 192, 3),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        Inception(192, 64, (96, 128), (16, 32), 32), Inception(256, 128, (128, 192), (32, 96), 64),
        nn.MaxPool3d(3, 2, 1),
        Inception(480, 192, (96, 208), (16, 48), 64), Inception(512, 160, (112, 224), (24, 64), 64),
        Inception(512, 128, (128, 256), (24, 64), 64), Inception(512, 112, (144, 288), (32, 64), 64),
        Inception(528, 256, (160, 320), (32, 128), 128),
        nn.MaxPool3d(2, 2),
        Inception(832, 256, (160, 320), (32, 128), 128), Inception(832, 384, (192, 384), (48, 128), 128),
        nn.AdaptiveAvgPool3d(1), nn.Conv3d(1024, classes, 1), nn.Flatten(),
    )  # fmt: skip


class PhysNet(nn.Module):
    """A pulse wave from a clip of a face: an encoder that halves time, a decoder that doubles it again."""

    def __init__(self, frames: int = 128) -> None:
        super().__init__()
        pool, halve = nn.MaxPool3d((1, 2, 2)), nn.MaxPool3d(2)
        self.encoder = nn.Sequential(
            _unit(3, 16, (1, 5, 5)), pool, _unit(16, 32, 3), _unit(32, 64, 3),
            halve, _unit(64, 64, 3), _unit(64, 64, 3), halve, _unit(64, 64, 3), _unit(64, 64, 3),
            pool, _unit(64, 64, 3), _unit(64, 64, 3),
        )  # fmt: skip

        def doubled() -> nn.Sequential:
            transposed = nn.ConvTranspose3d(64, 64, (4, 1, 1), (2, 1, 1), (1, 0, 0))
            return nn.Sequential(transposed, nn.BatchNorm3d(64), nn.ELU())

        self.decoder = nn.Sequential(doubled(), doubled(), nn.AdaptiveAvgPool3d((frames, 1, 1)), nn.Conv3d(64, 1, 1))

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(clip)).flatten(1)


class Attention(nn.Module):
    """A mask over positions whose mean is a half."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.sigmoid(self.convolution(x))
        return mask / mask.sum((2, 3), keepdim=True) * mask.shape[2] * mask.shape[3] * 0.5


class TwoStreams(nn.Module):
    """DeepPhys, and with ``frames`` TS-CAN: what moves, gated by where the skin is."""

    def __init__(self, side: int = 36, frames: int | None = None) -> None:
        super().__init__()
        self.frames = frames

        def pair(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList([nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3)])

        self.motion = nn.ModuleList([pair(3, 32), pair(32, 64)])
        self.appearance = nn.ModuleList([pair(3, 32), pair(32, 64)])
        self.gates = nn.ModuleList([Attention(32), Attention(64)])
        reduced = ((side - 2) // 2 - 2) // 2
        self.hidden, self.pulse = nn.Linear(64 * reduced * reduced, 128), nn.Linear(128, 1)

    def _stage(self, pair: nn.Module, x: torch.Tensor, shift: bool) -> torch.Tensor:
        for convolution in pair:
            x = torch.tanh(convolution(shifted(x, self.frames, 3) if shift and self.frames else x))
        return x

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        motion, appearance = pictures[:, :3], pictures[:, 3:]
        if self.frames:
            clips = appearance.view(-1, self.frames, *appearance.shape[1:])
            appearance = clips.mean(1, keepdim=True).expand_as(clips).reshape(appearance.shape)
        for moving, still, gate in zip(self.motion, self.appearance, self.gates, strict=True):
            motion, appearance = self._stage(moving, motion, True), self._stage(still, appearance, False)
            motion = F.avg_pool2d(motion * gate(appearance), 2)
            appearance = F.avg_pool2d(appearance, 2)
        return self.pulse(torch.tanh(self.hidden(motion.flatten(1))))


class EfficientPhys(nn.Module):
    """One stream: differences of frames, normalised, with shifts and self-attention masks."""

    def __init__(self, frames: int = 20, side: int = 72) -> None:
        super().__init__()
        self.frames = frames
        self.norm = nn.BatchNorm2d(3)
        plan = ((3, 32, 1), (32, 32, 0), (32, 64, 1), (64, 64, 0))
        self.convolutions = nn.ModuleList([nn.Conv2d(a, b, 3, padding=padding) for a, b, padding in plan])
        self.gates = nn.ModuleList([Attention(32), Attention(64)])
        reduced = ((side - 2) // 2 - 2) // 2
        self.hidden, self.pulse = nn.Linear(64 * reduced * reduced, 128), nn.Linear(128, 1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.diff(pictures, dim=0))
        for stage, gate in enumerate(self.gates):
            for convolution in self.convolutions[2 * stage : 2 * stage + 2]:
                x = torch.tanh(convolution(shifted(x, self.frames, 3)))
            x = F.avg_pool2d(x * gate(x), 2)
        return self.pulse(torch.tanh(self.hidden(x.flatten(1))))
