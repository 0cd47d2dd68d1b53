"""Shapes of a convolution or pooling window, and which of its taps fall inside the clip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

Triple = tuple[int, int, int]
#: The axes of a triple.
TIME, HEIGHT, WIDTH = range(3)


def triple(values: Iterable[int]) -> Triple:
    """Frames, height and width. Raises ValueError unless there are three values."""
    frames, height, width = values
    return frames, height, width


def added(one: Triple, other: Triple) -> Triple:
    """The sums by axis."""
    return triple(left + right for left, right in zip(one, other, strict=True))


#: Of height and width, where nothing moves along them.
_STILL = {
    **dict.fromkeys(("size", "out", "kernel", "stride", "dilation"), (1, 1)),
    "padding": (0, 0),
}


@dataclass(frozen=True)
class Window:
    """A window of ``kernel`` taps that slides over ``frames × height × width``; a 2D window has depth 1.

    ``padding`` is what lies before the clip on each axis; what lies behind follows from ``out``.
    """

    batch: int
    size: Triple
    out: Triple
    kernel: Triple
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)

    @property
    def frames_apart(self) -> bool:
        """Whether each output frame reads the input frame of its number alone."""
        frames = (self.kernel[TIME], self.stride[TIME], self.padding[TIME])
        return frames == (1, 1, 0) and self.size[TIME] == self.out[TIME]

    @property
    def by_frame(self) -> Window:
        """The same with each frame as a clip of its own, where ``frames_apart``."""
        size, out = (1, *self.size[1:]), (1, *self.out[1:])
        return replace(self, batch=self.batch * self.size[TIME], size=size, out=out)

    @property
    def along_frames(self) -> Window:
        """The same of the frames alone, as masks of frames see it."""
        axes = {name: (getattr(self, name)[TIME], *still) for name, still in _STILL.items()}
        return Window(self.batch, **axes)

    @property
    def taps(self) -> int:
        """Number of kernel offsets."""
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    @property
    def positions_in(self) -> int:
        """Input positions over the whole batch."""
        return self.batch * self.size[0] * self.size[1] * self.size[2]

    @property
    def positions_out(self) -> int:
        """Output positions over the whole batch."""
        return self.batch * self.out[0] * self.out[1] * self.out[2]

    def source(self, axis: int, index: int, tap: int) -> int:
        """The input coordinate that output ``index`` reads through ``tap``; may lie outside the clip."""
        return index * self.stride[axis] - self.padding[axis] + tap * self.dilation[axis]

    def live_taps(self, axis: int, index: int) -> tuple[int, ...]:
        """The taps through which output ``index`` reads inside the clip."""
        return tuple(tap for tap in range(self.kernel[axis]) if 0 <= self.source(axis, index, tap) < self.size[axis])

    @cached_property
    def classes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For each axis, the distinct sets of live taps in order of first appearance."""
        return tuple(
            tuple(dict.fromkeys(self.live_taps(axis, index) for index in range(self.out[axis]))) for axis in range(3)
        )

    def class_of(self, axis: int, index: int) -> int:
        """Which of ``classes[axis]`` output ``index`` belongs to."""
        return self.classes[axis].index(self.live_taps(axis, index))

    @cached_property
    def tap_positions(self) -> int:
        """Pairs of output position and tap that fall inside the clip: multiply by channels for executed MACs."""
        per_axis = [sum(len(self.live_taps(axis, index)) for index in range(self.out[axis])) for axis in range(3)]
        return self.batch * per_axis[0] * per_axis[1] * per_axis[2]

    def offset(self, tap: int) -> int:
        """Distance in positions from the first tap of the window to ``tap`` (frames outermost)."""
        _, height, width = self.size
        _, kernel_h, kernel_w = self.kernel
        frame, row, column = tap // (kernel_h * kernel_w), tap // kernel_w % kernel_h, tap % kernel_w
        return (frame * self.dilation[0] * height + row * self.dilation[1]) * width + column * self.dilation[2]


def side_by_side(window: Window, pool: Triple) -> Window:
    """Windows of ``pool`` outputs of ``window``, one beside the other."""
    frames, height, width = (extent // size for extent, size in zip(window.out, pool, strict=True))
    return Window(window.batch, window.out, (frames, height, width), pool, pool)


class GroupedChannels:
    """What follows from a layer's channels and convolution groups; subclasses declare the fields."""

    channels_in: int
    channels_out: int
    groups: int

    @property
    def depth(self) -> int:
        """Input channels that one output channel reads."""
        return self.channels_in // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of one convolution group."""
        return self.channels_out // self.groups
