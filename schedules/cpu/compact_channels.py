"""Live channels brought side by side, once per layer, for kernels that then read them as if there were no others.

Every value is copied once and read by taps × output channels multiply-adds: where they are many, the copy costs
little, and the convolution runs along whole cache lines and vectors whatever the mask. Where the mask leaves whole
vectors of channels they are copied as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from tvm import tirx

from ..emit import FLOAT, big, choose, flat, lanes, let, number, parallel, serial, store, when
from ..geometry import Window
from ..kernel import PLANNER, Kernel, Operand, frames_mask, listed, output
from ..plans import channel_list_shape
from .channel_plan import in_whole_vectors


@dataclass(frozen=True)
class CompactChannels(Kernel):
    """The kernel. Position ``p`` of a sample begins ``p`` times its live channels after the sample's beginning.

    ``in_frames``: a mask is given whose dead frames are not read.
    """

    kind = PLANNER
    name = "compact_channels"
    window: Window
    channels: int
    samples: int
    in_frames: bool
    vector_floats: int
    dtype: str = FLOAT

    def operands(self) -> list[Operand]:
        """x (N, T, H, W, C), in_channels, where asked for in_frames (N, T), and y (N, T, H, W, C)."""
        window = self.window
        shape = (window.batch, *window.size, self.channels)
        masks = [frames_mask("in_frames", window.batch, window.size[0])] if self.in_frames else []
        lists = listed("in_channels", channel_list_shape(self.samples, self.channels))
        return [Operand("x", shape, self.dtype), lists, *masks, output("y", shape, self.dtype)]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Copy line by line."""
        window, channels, samples = self.window, self.channels, self.samples
        frames, height, width = window.size
        area = height * width
        listed, mask = args["in_channels"], args.get("in_frames")
        x, y = flat(args["x"]), flat(args["y"])
        frames_each = window.batch // samples * frames
        with serial(samples) as sample:
            live = let(listed[sample, 0])
            whole = in_whole_vectors(listed, sample, self.vector_floats)
            skipped = let(big(sample * (frames_each * area)) * (channels - live))
            with parallel(frames_each * height) as offset:
                line = let(sample * (frames_each * height) + offset)
                frame = let(tirx.floordiv(line, height))
                alive = tirx.IntImm("bool", 1)
                if mask is not None:
                    alive = mask[tirx.floordiv(frame, frames), tirx.floormod(frame, frames)] != number(0.0)
                with when(alive), serial(width) as column:
                    position = let(big(line * width + column))
                    old, new = let(position * channels), let(position * live + skipped)

                    def copy(floats: int) -> None:
                        with serial(tirx.floordiv(live, floats)) as vector:
                            channel = let(listed[sample, 1 + vector * floats])
                            store(y, x[lanes(old + channel, floats)], lanes(new + vector * floats, floats))

                    choose(whole, partial(copy, self.vector_floats), partial(copy, 1))
