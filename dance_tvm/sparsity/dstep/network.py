"""A residual video network with D-STEP's policies on every block, and its streaming form.

A block decides from its (shifted) input alone, before its first convolution runs. With S the tile mask, r =
relu(bn(conv1(x))) and one-hot `compute` and `reuse`, equation 1 is

    merged[t] = S[t] * (compute[t] * r[t] + reuse[t] * merged[t-1])         merged before the first frame is 0

and the rest of the block reads `merged`. It is written so that an ordinary compiler sees what may be left out:

- frames are the batch axis, frame-major: one convolution gives r of all frames, (T*N, C_mid, h, w), and its only reader
  is `fresh = S * (compute * r)`, two products with masks of the whole batch, (T*N, 1, h, w) and (T*N, C_mid, 1, 1).
  So channel c of frame t need be computed only where compute[t, c] = 1 and S[t] = 1.
- the recurrence is a chain over slices of N along axis 0, `fresh[t] + S[t] * (reuse[t] * merged[t-1])`, whose T results
  are concatenated. S is 0/1 and one of the two terms is 0 everywhere, so this is equation 1 to the last bit.
- the next convolution reads `S * (live * merged)` with live[t] = max(compute[t], reuse[t] * live[t-1]): a channel whose
  chain of reuse begins at a computed frame. The product changes nothing; it says, as masks of the whole batch again,
  which inputs are zero. Training leaves it out.
- S is `tiles` (T*N, 1, a, b) with each element repeated p x p by reshape, expand and reshape, cropped to (h, w);
  `tiles` is a comparison with zero and a cast. compute is `(c >= maximum(s, r))`, reuse `(r >= s) * (1 - compute)`,
  each comparison cast to float. Where one tile covers the map, S is `tiles` itself: whole frames live or die.
- In the streaming graph T is 1: no slices, no concatenation; `merged[t-1]` and `live[t-1]` are inputs.

The recurrence takes the *merged* map of the frame before, as equation 1 has it. Equation 2 instead charges a channel's
computation to frame t where frame t+1 reuses it, as if the unmerged map were reused (AdaFuse's way); that would need
next frame's decision, which a stream cannot know. `flops.py` counts both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dance_tvm.core.errors import DanceError
from dance_tvm.models.resnet import Block, BlockHistory, History, VideoResNet, delayed, last_frame, zeros_like
from dance_tvm.sparsity.dstep.policy import Decision, SpatialPolicy, TemporalPolicy


class DStepOptions(BaseModel):
    """The policies' form. `tile` is the edge p of a tile by stage (the last one repeats), `hidden` the MLP's width.

    `group` channels side by side are decided together; the paper decides each alone. Winograd kernels leave out whole
    vectors of channels, 16 with AVX-512.

    Table 3's ablation switches parts off: `spatial` the tile masks, `reuse` the third way, `channels` the channel
    policy altogether (then every channel is computed).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tile: tuple[int, ...] = Field(default=(8,), min_length=1)
    hidden: int = Field(default=512, ge=1)
    group: int = Field(default=1, ge=1)
    spatial: bool = True
    channels: bool = True
    reuse: bool = True


class Tiles(NamedTuple):
    """Tiles and the mask that they make, as in `Decision`."""

    tiles: Tensor | None = None
    mask: Tensor | None = None


class BlockPolicy(nn.Module):
    """Both policies of one block, and equation 1."""

    def __init__(self, block: Block, stage: int, options: DStepOptions) -> None:
        super().__init__()
        conv = block.conv1
        tile = options.tile[min(stage, len(options.tile) - 1)]
        self.stride = conv.stride[0]
        self.spatial = SpatialPolicy(conv.in_channels, tile, self.stride) if options.spatial else None
        self.temporal = (
            TemporalPolicy(conv.in_channels, conv.out_channels, options.hidden, options.reuse, options.group)
            if options.channels
            else None
        )

    def forward(
        self, x: Tensor, count: int, before: BlockHistory | None, temperature: float
    ) -> tuple[Decision, Tensor | None]:
        """Decides for the block's input x (T*N, C, H, W) of `count` clips; also this frame's means (N, C) to keep."""
        means, drawn, settled = self.means(x, temperature)
        if self.temporal is None:
            ones = x.new_ones(x.shape[0], 1, 1, 1)
            return Decision(*drawn, ones, None, Decision(*settled, ones, None)), None
        ways, sure = self.temporal(self.before(means, count, before), means, temperature)
        decided = Decision(settled.tiles, settled.mask, sure.compute, sure.reuse) if self.training else None
        decision = Decision(drawn.tiles, drawn.mask, ways.compute, ways.reuse, decided)
        return decision, last_frame(means, count) if self.temporal.reuse else None

    def means(self, x: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tiles, Tiles]:
        """Channel means (T*N, C) of the masked input; the tiles with their masks as drawn, and as settled."""
        if self.spatial is None:
            return x.mean((2, 3)), Tiles(), Tiles()
        height, width = x.shape[2:]
        averages = self.spatial.average(x)
        drawn, settled = (
            Tiles(tiles, self.spatial.upsampled(tiles, -(-height // self.stride), -(-width // self.stride)))
            for tiles in self.spatial(averages, temperature)
        )
        assert drawn.tiles is not None
        return self.spatial.masked_means(averages, drawn.tiles, height * width), drawn, settled

    def before(self, means: Tensor, count: int, history: BlockHistory | None) -> Tensor:
        """The means (T*N, C) of the frame before each; of no frame, zeros."""
        return delayed(means, count, history.pooled if history else None)


class Merged(NamedTuple):
    """Merged maps (T*N, C, h, w), and which of their channels may be nonzero (T*N, C, 1, 1)."""

    maps: Tensor
    live: Tensor


def merge(result: Tensor, decision: Decision, count: int, before: Merged | None) -> Merged:
    """Equation 1 for all frames: the first convolution's `result` (T*N, C, h, w) merged with what is reused.

    `before` is that of the frame before the first one, (N, C, …); None where there is none.
    """
    shown = decision.shown
    fresh = _shown(shown, decision.compute * result)
    if decision.reuse is None:
        return Merged(fresh, decision.compute)
    merged: list[Merged] = []
    for index in range(result.shape[0] // count):
        maps, live = _frame(fresh, index, count), _frame(decision.compute, index, count)
        if before is not None:
            reuse = _frame(decision.reuse, index, count)
            mask = None if shown is None else _frame(shown, index, count)
            maps = maps + _shown(mask, reuse * before.maps)
            live = torch.maximum(live, reuse * before.live)
        before = Merged(maps, live)
        merged.append(before)
    return merged[0] if len(merged) == 1 else Merged(*map(torch.cat, zip(*merged, strict=True)))


def _shown(mask: Tensor | None, maps: Tensor) -> Tensor:
    return maps if mask is None else mask * maps


def _frame(x: Tensor, frame: int, count: int) -> Tensor:
    """Frame `frame` (N, …) of x (T*N, …); x itself where there is no other."""
    return x if x.shape[0] == count else x[frame * count : (frame + 1) * count]


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
        last = None
        if before is not None and before.merged is not None and before.live is not None:
            # The comparison shows a compiler that the state is a mask.
            last = Merged(before.merged, (before.live > 0).to(before.live.dtype))
        merged = merge(block.first(moved), decision, count, last)
        if self._watched is not None:
            self._watched.append(decision)
        if decision.reuse is None:
            return F.relu(block.rest(merged.maps) + block.shortcut(x)), BlockHistory(shifted, pooled)
        maps = merged.maps if self.training else _shown(decision.shown, merged.live * merged.maps)
        kept = BlockHistory(shifted, pooled, last_frame(merged.maps, count), last_frame(merged.live, count))
        return F.relu(block.rest(maps) + block.shortcut(x)), kept


class Stream(nn.Module):
    """One network, one frame per call: `scores, *state = stream(frame, *state)`, state being explicit tensors.

    `frame` is (N, C, H, W); scores (N, num_classes) are those of the frames so far, so that after T frames they equal
    the whole clip's. `state_names` names the tensors: the channels to shift, the pooled means, the merged maps of each
    block, the sum of scores and the number of frames. Maps are kept with channels innermost, (N, H, W, C), as compiled
    networks have them. `start` gives the state before the first frame: all zeros.
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
        return tuple(tensor.contiguous() for tensor in _flat(zeros_like(self._empty)))

    def forward(self, frame: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        if len(state) != len(self.state_names):
            raise DanceError(f"a stream of this network has {len(self.state_names)} state tensors, not {len(state)}")
        scores, history = self.network.run(frame.unsqueeze(2), self._history(state))
        return (scores, *_flat(history))

    def _history(self, state: tuple[Tensor, ...]) -> History:
        given = iter(state)
        blocks = tuple(
            BlockHistory(*(None if tensor is None else _channels_second(next(given)) for tensor in kept))
            for kept in self._empty.blocks
        )
        return History(blocks, next(given), next(given))


def _flat(history: History) -> tuple[Tensor, ...]:
    kept = [_channels_last(tensor) for block in history.blocks for tensor in block if tensor is not None]
    return (*kept, history.scores, history.frames)


def _channels_last(tensor: Tensor) -> Tensor:
    """Maps (N, C, H, W) as (N, H, W, C); other tensors as they are."""
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def _channels_second(tensor: Tensor) -> Tensor:
    """The inverse."""
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor
