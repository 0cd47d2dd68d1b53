"""What a frame takes over from the one before: ``y[t] = x[t] + y[t - 1]``, each under masks, in one pass (D-STEP's
equation 1).

A value is read where its masks keep it and counts as zero elsewhere, whatever lies there: the kernel that wrote ``x``
need not clear what it left out. The running value of a line of positions stays in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tvm import tirx

from ..emit import FLOAT, INT, Expr, choose, flat, lanes, let, number, parallel, scratch, serial, short, splat, store
from ..kernel import Kernel, Operand, channels_mask, frames_mask, output


@dataclass(frozen=True)
class Carry(Kernel):
    """``frames`` frames of ``count`` clips, (frames · count, height, width, channels), frame-major.

    Of ``fresh`` (x), ``taken`` (y of the frame before) and ``kept`` (what is stored of y), each names the masks that it
    is under: "positions" (frames · count, height, width) and "channels" (frames · count, channels). ``before``: a value
    of the frame before the first one is given, else there is none.
    """

    kind = "carry"
    frames: int
    count: int
    height: int
    width: int
    channels: int
    vector_floats: int
    fresh: tuple[str, ...]
    taken: tuple[str, ...]
    kept: tuple[str, ...] = ()
    before: bool = False
    #: How activations are stored; a sum of two is the same rounded once.
    dtype: str = FLOAT

    @property
    def name(self) -> str:
        """The kernel's name, as docs/kernels.md decodes it."""
        return f"carry_frames_{short(self.dtype)}_v{self.vector_floats}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(frames · count, height, width, channels)."""
        return (self.frames * self.count, self.height, self.width, self.channels)

    @property
    def masks(self) -> dict[tuple[str, str], Operand]:
        """The masks by what they are of and their axis, in the order of the parameters."""
        total, height, width, channels = self.shape
        positions = Operand("", (total, height, width), role="mask", field=(total, 1, height, width, 1))
        shapes = {
            "frames": frames_mask("", total, 1),
            "positions": positions,
            "channels": channels_mask("", "", total, channels),
        }
        named = {"fresh": self.fresh, "taken": self.taken, "kept": self.kept}
        return {
            (of, axis): replace(shapes[axis], name=f"{of}_{axis}", axis=f"{of}_{axis}")
            for of, axes in named.items()
            for axis in axes
        }

    def operands(self) -> list[Operand]:
        """x, the masks, where asked for before (count, height, width, channels), and y."""
        before = [Operand("before", (self.count, *self.shape[1:]), self.dtype, "residual")] if self.before else []
        x, y = Operand("x", self.shape, self.dtype), output("y", self.shape, self.dtype)
        return [x, *self.masks.values(), *before, y]

    def emit(self, args: Mapping[str, tirx.Buffer]) -> None:
        """Line by line of positions, frame after frame."""
        masks = {key: args[each.name] for key, each in self.masks.items()}
        emitter = _Emitter(self, flat(args["x"]), masks, flat(args["y"]))
        emitter.find_vectors()
        with parallel(self.count * self.height) as line:
            emitter.line(line, flat(args["before"]) if self.before else None)


class _Emitter:
    """``some``: of what is read, whether a whole vector of channels of a frame has any that its mask keeps."""

    def __init__(self, carry: Carry, x: tirx.Buffer, masks: dict[tuple[str, str], tirx.Buffer], y: tirx.Buffer) -> None:
        self.carry, self.x, self.masks, self.y = carry, x, masks, y
        self.some: dict[str, tirx.Buffer] = {}

    def _zero(self, count: int) -> Expr:
        return number(0.0, count, self.carry.dtype)

    def find_vectors(self) -> None:
        """Make ``some``. Elsewhere x would be read where all is reused, which takes as long as a copy alone."""
        frames, size = self.carry.shape[0], self.carry.vector_floats
        vectors = self.carry.channels // size
        for of in ("fresh", "taken") if vectors else ():
            if (of, "channels") in self.masks:
                mask, self.some[of] = self.masks[of, "channels"], scratch((frames, vectors), INT)
                with serial(frames) as frame, serial(vectors) as vector:
                    kept = [mask[frame, vector * size + lane] != number(0.0) for lane in range(size)]
                    store(self.some[of], tirx.Cast(INT, tirx.any(*kept)), frame, vector)

    def line(self, line: Expr, before: tirx.Buffer | None) -> None:
        """One line of positions of one clip, frame after frame."""
        carry = self.carry
        floats = carry.width * carry.channels
        running = scratch((floats,), carry.dtype)

        def begin(at: Expr, count: int) -> None:
            value = self._zero(count) if before is None else before[lanes(line * floats + at, count)]
            store(running, value, lanes(at, count))

        self._each_vector(floats, begin)
        clip, row = let(tirx.floordiv(line, carry.height)), let(tirx.floormod(line, carry.height))
        with serial(carry.frames) as t, serial(carry.width) as column:
            frame = let(t * carry.count + clip)
            target = let(((frame * carry.height + row) * carry.width + column) * carry.channels)
            self._position((frame, row, column), let(column * carry.channels), target, running)

    def _each_vector(self, floats: int, visit: Callable[[Expr, int], None]) -> None:
        """Call ``visit(first, lanes)`` over ``floats`` values: whole vectors, then the rest one by one."""
        size = self.carry.vector_floats
        whole = floats // size
        if whole:
            with serial(whole) as vector:
                visit(let(vector * size), size)
        if floats % size:
            with serial(floats % size) as rest:
                visit(let(whole * size + rest), 1)

    def _position(self, at: tuple[Expr, Expr, Expr], here: Expr, target: Expr, running: tirx.Buffer) -> None:
        """All channels of one position of one frame; ``here`` and ``target`` are its places in the line and in y."""
        alive = self._alive(at)

        def under(of: str, value: Expr, channel: Expr, count: int) -> Expr:
            """``value`` where the masks of ``of`` keep it, else zero."""
            mask = splat(alive[of], count) if of in alive else number(1.0, count)
            if (of, "channels") in self.masks:
                mask = mask * self.masks[of, "channels"][at[0], lanes(channel, count)]
            return tirx.Select(mask != number(0.0, count), value, self._zero(count))

        def merge(channel: Expr, count: int, of: tuple[str, ...] = ("fresh", "taken")) -> None:
            read = {
                "fresh": lambda: self.x[lanes(target + channel, count)],
                "taken": lambda: running[lanes(here + channel, count)],
            }
            terms = [under(each, read[each](), channel, count) for each in of]
            value = let(terms[0] + terms[1] if len(terms) > 1 else terms[0] if terms else self._zero(count))
            store(running, value, lanes(here + channel, count))
            store(self.y, under("kept", value, channel, count), lanes(target + channel, count))

        def merge_some(channel: Expr, count: int) -> None:
            """Of whole vectors only what has a channel that is kept."""
            asked = [each for each in ("fresh", "taken") if each in self.some] if count > 1 else []
            vector = tirx.floordiv(channel, self.carry.vector_floats)

            def ask(left: Sequence[str], of: tuple[str, ...]) -> None:
                if not left:
                    merge(channel, count, of)
                    return
                without = tuple(each for each in of if each != left[0])
                choose(
                    self.some[left[0]][at[0], vector] != 0, lambda: ask(left[1:], of), lambda: ask(left[1:], without)
                )

            ask(asked, ("fresh", "taken"))

        def clear(channel: Expr, count: int) -> None:
            store(running, self._zero(count), lanes(here + channel, count))
            store(self.y, self._zero(count), lanes(target + channel, count))

        if {"fresh", "taken"} <= alive.keys():
            some = alive["fresh"] + alive["taken"] != number(0.0)
            choose(some, lambda: self._each_channel(merge_some), lambda: self._each_channel(clear))
        else:
            self._each_channel(merge_some)

    def _alive(self, at: tuple[Expr, Expr, Expr]) -> dict[str, Expr]:
        """Whether a position of a frame (frame, row, column) is kept, 0 or not, of what has masks of either."""
        found: dict[str, Expr] = {}
        for of, axis in self.masks:
            if axis != "channels":
                mask = self.masks[of, axis]
                value = mask[at] if axis == "positions" else mask[at[0], 0]
                found[of] = value * found[of] if of in found else value
        return {of: let(value) for of, value in found.items()}

    def _each_channel(self, visit: Callable[[Expr, int], None]) -> None:
        self._each_vector(self.carry.channels, visit)
