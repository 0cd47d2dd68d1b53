"""A residual video network with D-STEP's policies on every block, and its streaming form.

A block decides from its (shifted) input alone, before its first convolution runs. With S the tile mask, r =
relu(bn(conv1(x))) and one-hot `compute` and `reuse`, equation 1 is written as

    merged[t] = S[t] * (compute[t] * r[t] + reuse[t] * merged[t-1])         merged before the first frame is 0

and the rest of the block reads `merged`. Seen by a compiler, in the exported graph of a clip of T frames:

- frames are the batch axis, frame-major: one convolution gives r of all frames, (T*N, C_mid, h, w), and its only
  readers are T slices of N along axis 0, each multiplied by `compute[t]` (N, C_mid, 1, 1) and, after the addition, by
  `S[t]` (N, 1, h, w). So channel c of frame t need be computed only where compute[t, c] = 1 and S[t] = 1.
- the chain is a plain sequence of slice, multiply, add, multiply; its T results are concatenated along axis 0 and read
  by the next convolution. Channel c of frame t is live there where live[t] = compute[t] + reuse[t] * live[t-1] is 1
  (live before the first frame is 0), a superset of which is "not skipped"; positions are live where S[t] is.
- S is `tiles` (N, 1, a, b) with each element repeated p x p by reshape, expand and reshape, cropped to (h, w); `tiles`
  is a comparison with zero and a cast. compute is `(c >= maximum(s, r))`, reuse `(r >= s) * (1 - compute)`, each a comparison and a cast.
- In the streaming graph T is 1: no slices, no concatenation, and `merged[t-1]` is an input.

The recurrence takes the *merged* map of the frame before, as equation 1 has it. Equation 2 instead charges a channel's
computation to frame t where frame t+1 reuses it, as if the unmerged map were reused (AdaFuse's way); that would need
next frame's decision, which a stream cannot know. `flops.py` counts both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dance_tvm.errors import DanceError
from dance_tvm.models.resnet import Block, BlockHistory, History, VideoResNet, delayed, zeros_like
from dance_tvm.sparsity.dstep.policy import Decision, SpatialPolicy, TemporalPolicy


class DStepOptions(BaseModel):
    """The policies' form. `tile` is the edge p of a tile by stage (the last one repeats), `hidden` the MLP's width.

    Table 3's ablation switches parts off: `spatial` the tile masks, `reuse` the third way, `channels` the channel
    policy altogether (then every channel is computed).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tile: tuple[int, ...] = Field(default=(8,), min_length=1)
    hidden: int = Field(default=512, ge=1)
    spatial: bool = True
    channels: bool = True
    reuse: bool = True


class BlockPolicy(nn.Module):
    """Both policies of one block, and equation 1."""

    def __init__(self, block: Block, stage: int, options: DStepOptions) -> None:
        super().__init__()
        conv = block.conv1
        tile = options.tile[min(stage, len(options.tile) - 1)]
        self.stride = conv.stride[0]
        self.spatial = SpatialPolicy(conv.in_channels, tile, self.stride) if options.spatial else None
        self.temporal = (
            TemporalPolicy(conv.in_channels, conv.out_channels, options.hidden, options.reuse)
            if options.channels
            else None
        )

    def forward(
        self, x: Tensor, count: int, before: BlockHistory | None, temperature: float
    ) -> tuple[Decision, Tensor | None]:
        """Decides for the block's input x (T*N, C, H, W) of `count` clips; also this frame's means (N, C) to keep."""
        means, tiles, mask = self.means(x, temperature)
        if self.temporal is None:
            return Decision(tiles, mask, x.new_ones(x.shape[0], 1, 1, 1), None), None
        compute, reuse = self.temporal(self.before(means, count, before), means, temperature)
        return Decision(tiles, mask, compute, reuse), means[-count:] if self.temporal.reuse else None

    def means(self, x: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Channel means (T*N, C) of the masked input, the tiles, and the mask of the first convolution's output."""
        if self.spatial is None:
            return x.mean((2, 3)), None, None
        height, width = x.shape[2:]
        averages = self.spatial.average(x)
        tiles = self.spatial(averages, temperature)
        mask = self.spatial.upsampled(tiles, -(-height // self.stride), -(-width // self.stride))
        return self.spatial.masked_means(averages, tiles, height * width), tiles, mask

    def before(self, means: Tensor, count: int, history: BlockHistory | None) -> Tensor:
        """The means (T*N, C) of the frame before each; of no frame, zeros."""
        return delayed(means, count, history.pooled if history else None)


def merge(result: Tensor, decision: Decision, count: int, before: Tensor | None) -> Tensor:
    """Equation 1 for all frames: the first convolution's `result` (T*N, C, h, w) merged with what is reused.

    `before` (N, C, h, w) is the merged map of the frame before the first one; None where there is none.
    """
    _, mask, compute, reuse = decision
    if reuse is None:
        computed = compute * result
        return computed if mask is None else mask * computed
    merged, last = [], before
    masks = mask.split(count) if mask is not None else (None,) * (result.shape[0] // count)
    frames = zip(result.split(count), masks, compute.split(count), reuse.split(count), strict=True)
    for frame, shown, computes, reuses in frames:
        now = computes * frame
        if last is not None:
            now = now + reuses * last
        last = now if shown is None else shown * now
        merged.append(last)
    return merged[0] if len(merged) == 1 else torch.cat(merged)


class DStepResNet(VideoResNet):
    """A `VideoResNet` whose blocks skip tiles and skip, reuse or compute channels; class scores (N, num_classes).

    Takes over the layers and weights of `network`; the policies are `policies.<block>`. In evaluation decisions are
    hard and repeatable; in training they are drawn, at `temperature`.
    """

    def __init__(self, network: VideoResNet, options: DStepOptions | None = None) -> None:
        nn.Module.__init__(self)
        self.temporal, self.stem, self.stages = network.temporal, network.stem, network.stages
        for name, layer in network.named_children():
            self.add_module(name, layer)
        self.options = options or DStepOptions()
        stages = [self.stages.index(name.partition(".")[0]) for name, _ in self.residual_blocks()]
        self.policies = nn.ModuleList(
            BlockPolicy(block, stage, self.options)
            for stage, (_, block) in zip(stages, self.residual_blocks(), strict=True)
        ).to(self.fc.weight)
        self.temperature = 0.67
        self._watched: list[Decision] | None = None
        self.train(network.training)

    def watch(self, decisions: list[Decision] | None) -> None:
        """Appends what later forward passes decide to `decisions`, one entry a block and pass; None ends that."""
        self._watched = decisions

    @contextmanager
    def watched(self) -> Iterator[list[Decision]]:
        """Collects what the forward passes made meanwhile decide."""
        decisions: list[Decision] = []
        outer = self._watched
        self.watch(decisions)
        try:
            yield decisions
        finally:
            self.watch(outer)

    def run_block(
        self, index: int, block: Block, x: Tensor, count: int, before: BlockHistory | None
    ) -> tuple[Tensor, BlockHistory]:
        moved, shifted = self.shift(x, count, before)
        decision, pooled = self.policies[index](moved, count, before, self.temperature)
        merged = merge(block.first(moved), decision, count, before.merged if before else None)
        if self._watched is not None:
            self._watched.append(decision)
        kept = BlockHistory(shifted, pooled, None if decision.reuse is None else merged[-count:])
        return F.relu(block.rest(merged) + block.shortcut(x)), kept


class Stream(nn.Module):
    """One network, one frame a call: `scores, *state = stream(frame, *state)`, state being explicit tensors.

    `frame` is (N, C, H, W); scores (N, num_classes) are those of the frames so far, so that after T frames they equal
    the whole clip's. `state_names` names the tensors: the channels to shift, the pooled means, the merged maps of each
    block, the sum of scores and the number of frames. `start` gives them before the first frame: all zeros.
    Raises DanceError for a network that looks ahead (TSM's offline form).
    """

    def __init__(self, network: VideoResNet, frame_shape: tuple[int, int, int], clips: int = 1) -> None:
        super().__init__()
        if network.temporal == "tsm":
            raise DanceError("a tsm network looks one frame ahead and cannot stream; build it as tsm-online")
        self.network = network
        self._empty = network.empty_history(network.conv1.weight.new_zeros(clips, frame_shape[0], 1, *frame_shape[1:]))
        names = [name for name, _ in network.residual_blocks()]
        self.state_names = [
            f"{name}.{field}"
            for name, kept in zip(names, self._empty.blocks, strict=True)
            for field, tensor in zip(BlockHistory._fields, kept, strict=True)
            if tensor is not None
        ] + ["scores", "frames"]

    def start(self) -> tuple[Tensor, ...]:
        """The state before the first frame."""
        return _flat(zeros_like(self._empty))

    def forward(self, frame: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        if len(state) != len(self.state_names):
            raise DanceError(f"a stream of this network has {len(self.state_names)} state tensors, not {len(state)}")
        scores, history = self.network.run(frame.unsqueeze(2), self._history(state))
        return (scores, *_flat(history))

    def _history(self, state: tuple[Tensor, ...]) -> History:
        given = iter(state)
        blocks = tuple(
            BlockHistory(*(None if tensor is None else next(given) for tensor in kept)) for kept in self._empty.blocks
        )
        return History(blocks, next(given), next(given))


def _flat(history: History) -> tuple[Tensor, ...]:
    kept = [tensor for block in history.blocks for tensor in block if tensor is not None]
    return (*kept, history.scores, history.frames)
