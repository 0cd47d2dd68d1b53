"""ResNet-18 and ResNet-50 for video: as TSN (segment consensus) and as TSM (temporal shift), and small sisters.

TSN (Wang et al., 2016) runs a 2D network on every frame and averages the frames' scores. TSM (Lin et al., 2019) is the
same network in which each residual block first moves an eighth of its input channels by one frame: `"tsm"` from the
frame before and another eighth from the frame after, `"tsm-online"` from the frame before only, which is what a live
stream allows.

One forward pass serves whole clips and streams. Frames are the batch axis, frame-major: (T*N, C, H, W), so that frame
t of every clip is the slice `[t*N:(t+1)*N]` and one convolution handles all frames. `run` starts from a `History`: the
tensors kept of the frame before the first one. A clip starts from none; a stream gives back what the call before left.

Weights are named as torchvision names them (`layer1.0.conv1.weight`), so ImageNet checkpoints load as they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_tvm.core.errors import DanceError
from dance_tvm.models.checkpoints import Rules
from dance_tvm.models.layers import seed_weights

Temporal = Literal["tsn", "tsm", "tsm-online"]
SHIFT_SHARE = 8  # one channel in eight moves by a frame (TSM, section 4.1)

# TSM's releases keep the backbone under base_model, wrap the shifted convolution, and name the head new_fc.
_TSM_RELEASE: Rules = (
    (r"base_model\.(layer\d\.\d+\.conv1)\.net\.", r"\1."),
    (r"base_model\.", ""),
    (r"new_fc\.", "fc."),
)


class BlockHistory(NamedTuple):
    """What one block keeps of the last frame; None where the network does not use it.

    `shifted` (N, C/8, H, W): the channels that move one frame on. The others are D-STEP's: `pooled` (N, C), the masked
    input's channel means, `merged` (N, C_mid, h, w), the first convolution's result, and `live` (N, C_mid, 1, 1), which
    of its channels may be nonzero.
    """

    shifted: Tensor | None = None
    pooled: Tensor | None = None
    merged: Tensor | None = None
    live: Tensor | None = None


class History(NamedTuple):
    """What a stream keeps: one entry a block, the sum (N, classes) of the frames' scores and their number (1, 1)."""

    blocks: tuple[BlockHistory, ...]
    scores: Tensor
    frames: Tensor


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(channels, width, stride)

    def first(self, x: Tensor) -> Tensor:
        """The first convolution with its batch norm and ReLU: what D-STEP thins."""
        return F.relu(self.bn1(self.conv1(x)))

    def rest(self, x: Tensor) -> Tensor:
        """Everything after `first` on the residual branch."""
        return self.bn2(self.conv2(x))

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50); the 3x3 one carries the stride, as in torchvision."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _downsample(channels, width * self.expansion, stride)

    def first(self, x: Tensor) -> Tensor:
        """The first convolution with its batch norm and ReLU: what D-STEP thins."""
        return F.relu(self.bn1(self.conv1(x)))

    def rest(self, x: Tensor) -> Tensor:
        """Everything after `first` on the residual branch."""
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


Block = BasicBlock | Bottleneck


def _downsample(channels: int, out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class VideoResNet(nn.Module):
    """Class scores (N, num_classes) of clips (N, in_channels, T, H, W).

    `blocks` residual blocks a stage; stage s has `width * 2**s` channels (times 4 with bottlenecks). `stem` is
    "imagenet" (7x7 of stride 2, then pooling of stride 2) or "small" (3x3 of stride 2). Any T, H and W are accepted.
    Raises DanceError for an unknown `temporal` or `stem`.
    """

    checkpoint_rules = _TSM_RELEASE

    def __init__(
        self,
        block: type[Block],
        blocks: tuple[int, ...],
        *,
        temporal: Temporal = "tsn",
        num_classes: int = 400,
        in_channels: int = 3,
        width: int = 64,
        stem: Literal["imagenet", "small"] = "imagenet",
    ) -> None:
        super().__init__()
        if temporal not in ("tsn", "tsm", "tsm-online"):
            raise DanceError(f"temporal={temporal!r} is unknown; choose tsn, tsm or tsm-online")
        if stem not in ("imagenet", "small"):
            raise DanceError(f"stem={stem!r} is unknown; choose imagenet or small")
        self.temporal, self.stem = temporal, stem
        kernel = 7 if stem == "imagenet" else 3
        self.conv1 = nn.Conv2d(in_channels, width, kernel, 2, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = tuple(f"layer{number}" for number in range(1, len(blocks) + 1))
        channels = width
        for number, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            stage = nn.Sequential()
            for index in range(count):
                stride = 2 if number > 0 and index == 0 else 1
                stage.append(block(channels, width * 2**number, stride))
                channels = width * 2**number * block.expansion
            self.add_module(name, stage)
        self.fc = nn.Linear(channels, num_classes)
        seed_weights(self)

    def forward(self, clips: Tensor) -> Tensor:
        return self.run(clips)[0]

    def residual_blocks(self) -> list[tuple[str, Block]]:
        """Every residual block with its name, in the order they run."""
        stages = ((name, self.get_submodule(name)) for name in self.stages)
        named = [(f"{name}.{index}", block) for name, stage in stages for index, block in stage.named_children()]
        return cast(list[tuple[str, Block]], named)

    def run(self, clips: Tensor, history: History | None = None) -> tuple[Tensor, History]:
        """Scores (N, num_classes) of the clip so far, and the history that the next frames continue from.

        `clips` is (N, C, T, H, W) with any T: all of a clip at once, or one frame of a stream.
        """
        count = clips.shape[0]
        x = clips.permute(2, 0, 1, 3, 4).flatten(0, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1)
        entries = self.residual_blocks()
        befores = history.blocks if history else (None,) * len(entries)
        kept = []
        for index, ((_, block), before) in enumerate(zip(entries, befores, strict=True)):
            x, after = self.run_block(index, block, x, count, before)
            kept.append(after)
        scores = self.fc(x.mean((2, 3)))
        total, frames = _consensus(scores, count, history)
        return total / frames, History(tuple(kept), total, frames)

    def run_block(
        self, index: int, block: Block, x: Tensor, count: int, before: BlockHistory | None
    ) -> tuple[Tensor, BlockHistory]:
        """One residual block on x (T*N, C, H, W) of `count` clips, and what it keeps for the next frame."""
        moved, kept = self.shift(x, count, before)
        return F.relu(block.rest(block.first(moved)) + block.shortcut(x)), BlockHistory(shifted=kept)

    def shift(self, x: Tensor, count: int, before: BlockHistory | None) -> tuple[Tensor, Tensor | None]:
        """TSM's shift of x (T*N, C, H, W) along frames, and the channels (N, C/8, H, W) to keep for the next one."""
        if self.temporal == "tsn":
            return x, None
        fold = x.shape[1] // SHIFT_SHARE
        if self.temporal == "tsm-online":
            first = before.shifted if before else None
            past = delayed(x[:, :fold], count, first)
            return torch.cat([past, x[:, fold:]], 1), last_frame(x[:, :fold], count)
        if before is not None:
            raise DanceError("tsm looks one frame ahead and cannot stream; use tsm-online")
        future = x[count:, :fold]
        future = torch.cat([future, x.new_zeros(count, *future.shape[1:])])
        past = delayed(x[:, fold : 2 * fold], count, None)
        return torch.cat([future, past, x[:, 2 * fold :]], 1), None

    def empty_history(self, clips: Tensor) -> History:
        """The history before the first frame: zeros of the shapes that clips (N, C, T, H, W) call for."""
        training = self.training
        with torch.no_grad():
            _, history = self.eval().run(clips[:, :, :1])
        self.train(training)
        return zeros_like(history)


def delayed(x: Tensor, count: int, first: Tensor | None) -> Tensor:
    """x (T*N, …) moved one frame later: frame t holds frame t-1, and frame 0 holds `first` (zeros where None)."""
    first = x.new_zeros(count, *x.shape[1:]) if first is None else first
    return first if x.shape[0] == count else torch.cat([first, x[:-count]])


def last_frame(x: Tensor, count: int) -> Tensor:
    """The last frame (N, …) of x (T*N, …)."""
    return x if x.shape[0] == count else x[-count:]


def zeros_like(history: History) -> History:
    """A history of the same shapes that holds nothing: what a stream starts from."""
    blocks = tuple(BlockHistory(*(None if t is None else torch.zeros_like(t) for t in kept)) for kept in history.blocks)
    return History(blocks, torch.zeros_like(history.scores), torch.zeros_like(history.frames))


def _consensus(scores: Tensor, count: int, history: History | None) -> tuple[Tensor, Tensor]:
    """Sum over frames of scores (T*N, classes) and the number of frames (1, 1), with those of the history.

    The sum goes frame by frame, so that a stream and a whole clip round alike.
    """
    parts = [scores] if scores.shape[0] == count else list(scores.split(count))
    total = parts[0] if history is None else history.scores + parts[0]
    for part in parts[1:]:
        total = total + part
    frames = scores.new_full((1, 1), len(parts))
    return total, frames if history is None else history.frames + frames


def resnet18(num_classes: int = 400, temporal: Temporal = "tsn", in_channels: int = 3) -> VideoResNet:
    """ResNet-18 on clips (N, C, T, H, W), a 2D network frame by frame."""
    return VideoResNet(BasicBlock, (2, 2, 2, 2), temporal=temporal, num_classes=num_classes, in_channels=in_channels)


def resnet50(num_classes: int = 400, temporal: Temporal = "tsn", in_channels: int = 3) -> VideoResNet:
    """ResNet-50 on clips (N, C, T, H, W), a 2D network frame by frame."""
    return VideoResNet(Bottleneck, (3, 4, 6, 3), temporal=temporal, num_classes=num_classes, in_channels=in_channels)


def resnet_mini(
    num_classes: int = 8, temporal: Temporal = "tsm-online", in_channels: int = 1, width: int = 16
) -> VideoResNet:
    """ResNet-18's plan in three narrow stages, for 8 to 16 frames of 32 to 56 pixels; 0.18 M parameters."""
    return VideoResNet(
        BasicBlock,
        (2, 2, 2),
        temporal=temporal,
        num_classes=num_classes,
        in_channels=in_channels,
        width=width,
        stem="small",
    )
