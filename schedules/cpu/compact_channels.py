"""Live channels brought side by side, once per layer, for kernels that then read them as if there were no others.

Every value is copied once and read by taps × output channels multiply-adds: where they are many, the copy costs
little, and the convolution runs along whole cache lines and vectors whatever the mask. Where the mask leaves whole
vectors of channels they are copied as such.
"""

from __future__ import annotations

from functools import partial

from tvm import tirx

from ..emit import INT, argument, big, choose, flat, kernel, lanes, let, number, parallel, serial, store, when
from ..geometry import Window
from ..plans import channel_list_shape
from .channel_plan import in_whole_vectors


def compact_channels(
    window: Window,
    channels: int,
    samples: int,
    in_frames: bool,
    vector_floats: int,
    name: str = "compact_channels",
) -> tirx.PrimFunc:
    """Emit the kernel.

    Parameters: x (N, T, H, W, C), in_channels (:mod:`~.channel_plan`), where asked for in_frames (N, T), a mask whose
    dead frames are not read, and y (N, T, H, W, C). Position ``p`` of a sample begins ``p`` times the sample's live
    channels after the sample's beginning.
    """
    frames, height, width = window.size
    area, shape = height * width, (window.batch, *window.size, channels)
    with kernel(name) as built:
        source = argument("x", shape)
        listed = argument("in_channels", channel_list_shape(samples, channels), INT)
        mask = argument("in_frames", (window.batch, frames)) if in_frames else None
        target = argument("y", shape)
        x, y = flat(source), flat(target)
        frames_each = window.batch // samples * frames
        with serial(samples) as sample:
            live = let(listed[sample, 0])
            whole = in_whole_vectors(listed, sample, vector_floats)
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

                    choose(whole, partial(copy, vector_floats), partial(copy, 1))
    return built.func
