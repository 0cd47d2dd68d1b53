"""Whole small networks as the three papers make them, with random weights and policies."""

from __future__ import annotations

from random import Random
from typing import Any

from .program import Program, Step

SHARE = 0.04


def whole_network(rng: Random, seed: int, options: dict[str, Any]) -> Program:
    """D-STEP by clip or as a stream, or a network pruned by DANCE's controller or scaled by its adaptors."""
    options.pop("target", None), options.pop("dtype", None)
    form = rng.choice((_dstep_clip,) * 3 + (_dance,) * 3 + (_adaptors, _dstep_stream))
    inputs, step = form(rng)
    return Program(seed, inputs, [step], [len(inputs)], options)


def _dstep(rng: Random, temporal: str, shape: list[int]) -> list[str]:
    blocks = rng.choice(("(1,)", "(1,)", "(1, 1)"))
    stem = "small"
    options = f"DStepOptions(tile={rng.choice(('(2,)', '(3,)', '(4,)'))}, hidden={rng.choice((4, 8))})"
    if blocks == "(1, 1)":
        options = f"DStepOptions(tile={rng.choice(('(2, 2)', '(3, 2)'))}, hidden=4)"
    mix = f"Mix({rng.choice((0.2, 0.5, 1.0))}, {rng.choice((0.1, 0.5, 0.9))}, {rng.choice((0.0, 0.2, 0.6))})"
    block = rng.choice(("BasicBlock", "BasicBlock", "Bottleneck"))
    return [
        "from dance_tvm.models.resnet import BasicBlock, Bottleneck, VideoResNet",
        "from dance_tvm.sparsity.dstep.network import DStepOptions, DStepResNet, Stream",
        "from benchmarks.random_policies import Mix, example_clip, with_mix",
        f"base = VideoResNet({block}, {blocks}, temporal={temporal!r}, "
        f"num_classes=3, in_channels={shape[1]}, width={rng.choice((8, 8, 16))}, stem={stem!r})",
        f"clip = example_clip({tuple(shape[1:])}, seed={rng.randrange(99)})",
        f"{{l}} = with_mix(settle(base, 1), clip, {mix}, options={options}, seed={rng.randrange(99)})",
    ]


def _clip_shape(rng: Random) -> list[int]:
    return [rng.choice((1, 1, 2)), rng.choice((1, 3)), rng.choice((2, 3, 4)), *rng.choice(((8, 8), (9, 7), (12, 10)))]


def _dstep_clip(rng: Random) -> tuple[list[list[int]], Step]:
    shape = _clip_shape(rng)
    temporal = rng.choice(("tsm", "tsm-online", "tsn"))
    return [shape], Step("dstep", [0], ["{y} = {l}({x})"], _dstep(rng, temporal, shape))


def _dstep_stream(rng: Random) -> tuple[list[list[int]], Step]:
    """A frame after some others: the state that they leave is a constant."""
    shape = [1, *_clip_shape(rng)[1:]]
    init = _dstep(rng, "tsm-online", shape)
    frame = f"({shape[1]}, {shape[3]}, {shape[4]})"
    init += [
        f"{{l}} = Stream({{l}}.eval(), {frame}).eval()",
        "state = {l}.start()",
        f"for index in range({rng.choice((1, 2))}): state = {{l}}(clip[:, :, index % clip.shape[2]], *state)[1:]",
        "self.names = [f'state{{i}}' for i in range(len(state))]",
        "for name, tensor in zip(self.names, state): self.register_buffer(name, tensor.detach().clone())",
    ]
    body = [
        "a, *state = {l}({x}, *[getattr(self, name) for name in self.names])",
        "{y} = torch.cat([a.flatten(1), *[b.to(a.dtype).reshape(a.shape[0], -1) for b in state]], 1)",
    ]
    return [[1, shape[1], *shape[3:]]], Step("dstep stream", [0], body, init)


_CONVOLUTIONS = "nn.Sequential({}, nn.ReLU(), {}, nn.ReLU(), nn.Conv3d({}, 4, 1))"


def _base(rng: Random, channels: int) -> str:
    width = rng.choice((6, 8, 10))
    first = f"nn.Conv3d({channels}, {width}, 3, padding=1)"
    second = rng.choice(
        (
            f"nn.Conv3d({width}, {width}, 3, padding=1)",
            f"nn.Conv3d({width}, {width}, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d({width})",
            f"nn.Conv3d({width}, {width}, 3, stride=(1, 2, 2), padding=1)",
            f"nn.Conv3d({width}, {width}, 3, padding=1), nn.ReLU(), nn.MaxPool3d((1, 2, 2)), "
            f"nn.Conv3d({width}, {width}, 3, padding=1)",
        )
    )
    return _CONVOLUTIONS.format(first, second, width)


def _dance(rng: Random) -> tuple[list[list[int]], Step]:
    shape = _clip_shape(rng)
    axes = rng.choice(
        ("('frames', 'channels', 'positions')",) * 3
        + ("('frames',)", "('channels',)", "('positions',)", "('frames', 'positions')")
    )
    group = rng.choice((2, 4, 8))
    init = [
        "from dance_tvm.sparsity.dance.method import prune",
        f"base = settle({_base(rng, shape[1])}, 2)",
        f"{{l}} = prune(base, {tuple(shape[1:])}, axes={axes}, group={group}, grid={rng.choice((2, 3, 4))})",
        "with torch.no_grad():",
        f"    {{l}}.controller.theta.fill_({rng.choice((-0.3, 0.0, 0.2))})",
        "    [p.normal_(std=0.7) for n, p in {l}.controller.named_parameters() if 'heads' in n]",
    ]
    return [shape], Step("dance", [0], ["{y} = {l}({x})"], ["\n".join(init)])


def _adaptors(rng: Random) -> tuple[list[list[int]], Step]:
    n, c, t, h, w = _clip_shape(rng)
    init = [
        "from dance_tvm.sparsity.dance.adaptors import Adaptor",
        f"{{l}} = nn.Sequential(nn.Conv3d({c}, 8, 3, padding=1), Adaptor(8, {t}, {h}, {w}), nn.Conv3d(8, 4, 1))",
        "for parameter in {l}[1].parameters(): parameter.data.normal_().round_()",
    ]
    return [[n, c, t, h, w]], Step("adaptors", [0], ["{y} = {l}({x})"], init)
