"""What a layer takes at the least: its multiply-adds, loads into registers, and bytes from the caches or memory.

Each rate is measured by a kernel of its own, in the same process as the layer, so that a slow moment of the machine
slows both. The bound is the longest of the three, as though the others went on beside it at no cost. It is the
algorithm's, not the kernel's: lanes that hold no channel, vectors that cross cache lines and inputs that are read twice
do not count. Activations are added to the multiply-adds: both keep the same units busy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import tirx

from dance_tvm.machines.target import Target
from dance_tvm.schedules.cpu.depthwise_tiles import held_taps, input_vectors, line_axis, register_tiles
from dance_tvm.schedules.cpu.tiles import Machine, candidates
from dance_tvm.schedules.elementary import written_out
from dance_tvm.schedules.emit import argument, kernel, lanes, let, number, parallel, read, scratch, serial, store
from dance_tvm.schedules.epilogue import write_activated
from dance_tvm.schedules.workload import POOL, Workload

from .kernels import Peak, build, tensor

#: Seconds of one mean, and how many are taken in one go.
MEAN_SECONDS, MEANS = 3e-4, 10
#: Activations of one instruction or two.
CLAMPS = ("relu", "relu6")


@dataclass(frozen=True)
class Need:
    """What a layer cannot do without: multiply-adds, vectors loaded for its sums, bytes read and written once."""

    macs: float
    loads: float
    bytes_in: int
    bytes_out: int

    @staticmethod
    def of(workload: Workload, machine: Machine) -> Need:
        """That of a dense layer in float32 on a machine."""
        window = workload.window
        bytes_out = 4 * window.positions_out * workload.channels_out
        weights = 0 if workload.family == POOL else workload.weight_bytes
        bytes_in = 4 * window.positions_in * workload.channels_in + weights + bytes_out * workload.residual
        macs = workload.work
        return Need(macs, macs / machine.vector_floats * loads_per_product(workload, machine), bytes_in, bytes_out)


def loads_per_product(workload: Workload, machine: Machine) -> float:
    """Loads for each multiply-add of vectors, by the register tile that needs the fewest.

    A tile of sums of a matrix product loads each of its rows and vectors of weights once for each term. A depthwise
    one, whose outputs lie side by side, loads a line of inputs and of weights for each line of taps.
    """
    if workload.groups == 1:
        tiles = ((rows, vectors) for rows, vectors, step in candidates(machine) if step == 1)
        return min((rows + vectors) / (rows * vectors) for rows, vectors in tiles)
    window = workload.window
    axis = line_axis(window, masked_frames=False)

    def loads(mr: int, frames: int) -> float:
        taps = held_taps(window, axis, frames)
        return (input_vectors(window, axis, mr, frames) + taps) / (mr * frames * taps)

    return min(loads(mr, frames) for mr, _, frames in register_tiles(machine, window, workload.channels_out))


class Loads:
    """The rate at which vectors come from the first-level cache into registers, loads a second."""

    CHAINS, LINES, STEPS, TASKS = 12, 12 * 8, 1_000, 8

    def __init__(self, target: Target, threads: int) -> None:
        self.floats = target.vector.floats
        self.library = build(self._kernel(), target.tvm_target(threads))
        self.args = [
            tensor(np.ones(self.LINES * self.floats, "float32")),
            tensor(np.zeros(self.TASKS * self.floats, "float32")),
        ]

    def _kernel(self) -> tirx.PrimFunc:
        floats = self.floats
        with kernel("loads") as built:
            source, target = argument("source", (self.LINES * floats,)), argument("target", (self.TASKS * floats,))
            with parallel(self.TASKS) as task:
                chains = [scratch((floats,)) for _ in range(self.CHAINS)]
                for chain in chains:
                    store(chain, number(0.0, floats), lanes(0, floats))
                with serial(self.STEPS), serial(self.LINES // self.CHAINS) as line:
                    for index, chain in enumerate(chains):
                        value = source[lanes((line * self.CHAINS + index) * floats, floats)]
                        store(chain, chain[lanes(0, floats)] + value, lanes(0, floats))
                total = chains[0][lanes(0, floats)]
                for chain in chains[1:]:
                    total = total + chain[lanes(0, floats)]
                store(target, total, lanes(task * floats, floats))
        return built.func

    def per_second(self) -> float:
        """Over all threads."""
        return self.TASKS * self.STEPS * self.LINES / least(self.library, "loads", self.args)


class Traffic:
    """Reads so many bytes and writes so many others, piece by piece: what a layer moves, with nothing computed."""

    CHAINS = 8

    def __init__(self, need: Need, target: Target, threads: int) -> None:
        self.floats = target.vector.floats
        step = 4 * self.floats * self.CHAINS
        vectors_in, vectors_out = (-(-size // step) for size in (need.bytes_in, need.bytes_out))
        self.tasks = threads
        self.pieces = max(1, math.ceil(min(vectors_in, vectors_out) / threads))
        self.each = [-(-count // (threads * self.pieces)) for count in (vectors_in, vectors_out)]
        #: Of the bytes that it moves, the share that the layer needs: pieces are whole.
        self.share = (need.bytes_in + need.bytes_out) / (step * threads * self.pieces * sum(self.each))
        self.library = build(self._kernel(), target.tvm_target(threads))
        sizes = [threads * self.pieces * count * self.CHAINS * self.floats for count in self.each]
        self.args = [tensor(np.ones(size, "float32")) for size in sizes]

    def _kernel(self) -> tirx.PrimFunc:
        floats, (reads, writes) = self.floats, self.each
        line = self.CHAINS * floats
        all_of = [self.tasks * self.pieces * count * line for count in self.each]
        with kernel("traffic") as built:
            source, target = argument("source", (all_of[0],)), argument("target", (all_of[1],))
            with parallel(self.tasks) as task:
                chains = [scratch((floats,)) for _ in range(self.CHAINS)]
                for chain in chains:
                    store(chain, number(0.0, floats), lanes(0, floats))
                with serial(self.pieces) as piece:
                    place = let(task * self.pieces + piece)
                    with serial(reads) as index:
                        for at, chain in enumerate(chains):
                            value = source[lanes((place * reads + index) * line + at * floats, floats)]
                            store(chain, chain[lanes(0, floats)] + value, lanes(0, floats))
                    with serial(writes) as index:
                        for at, chain in enumerate(chains):
                            store(
                                target,
                                chain[lanes(0, floats)],
                                lanes((place * writes + index) * line + at * floats, floats),
                            )
        return built.func

    def seconds(self) -> float:
        """What the layer's bytes take, from where they lie after a call before."""
        return least(self.library, "traffic", self.args) * self.share


class Activation:
    """An activation of values in the first-level cache, which are not kept."""

    VALUES = 2048

    def __init__(self, activation: str, target: Target, threads: int) -> None:
        self.floats = target.vector.floats
        self.library = build(written_out(self._kernel(activation)), target.tvm_target(threads))
        self.args = [
            tensor(np.linspace(-4, 4, self.VALUES).astype("float32")),
            tensor(np.zeros(self.VALUES, "float32")),
        ]

    def _kernel(self, activation: str) -> tirx.PrimFunc:
        with kernel("activation") as built:
            source, target = argument("source", (self.VALUES,)), argument("target", (self.VALUES,))
            with serial(64), serial(self.VALUES // self.floats) as index:
                at = let(index * self.floats)
                write_activated(target, activation, read(source, at, self.floats), at, self.floats)
        return built.func

    def seconds(self) -> float:
        """Of one value on one thread."""
        return least(self.library, "activation", self.args) / (64 * self.VALUES)


def least(library: tvm.runtime.Executable, name: str, args: Sequence[tvm.runtime.Tensor]) -> float:
    """Seconds of a call, as the least of some means over MEAN_SECONDS: long enough for the clock, and short enough for
    some to end before other work gets its turn."""
    once = min(library.mod.time_evaluator(name, tvm.cpu(), 1, 3)(*args).results)
    number = max(1, int(MEAN_SECONDS / once))
    return float(min(library.mod.time_evaluator(name, tvm.cpu(), number, MEANS)(*args).results))


class Bounds:
    """What bounds a layer, each kind of work measured again and again."""

    def __init__(self, workload: Workload, machine: Machine, target: Target, peak: Peak, loads: Loads) -> None:
        threads = workload.threads
        self.need, self.peak, self.loads, self.threads = Need.of(workload, machine), peak, loads, threads
        self.traffic = Traffic(self.need, target, threads)
        computes = workload.activation not in ("", *CLAMPS)
        self.activation = Activation(workload.activation, target, threads) if computes else None
        #: Least seconds so far of each kind.
        self.seconds: dict[str, float] = {}

    def measure(self) -> None:
        """Once more."""
        values = self.need.bytes_out / 4 / self.threads
        activated = self.activation.seconds() * values if self.activation else 0.0
        found = {
            "multiply-adds": 2e-9 * self.need.macs / self.peak.most() + activated,
            "loads": self.need.loads / self.loads.per_second(),
            "bytes": self.traffic.seconds(),
        }
        self.seconds = {kind: min(seconds, self.seconds.get(kind, seconds)) for kind, seconds in found.items()}

    @property
    def longest(self) -> tuple[str, float]:
        """The kind of work that takes longest, and its seconds."""
        return max(self.seconds.items(), key=lambda pair: pair[1])
