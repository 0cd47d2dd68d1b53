"""Which lists pay: those of channels where every sample of a batch has its own, and those of positions of the input.

Lists of channels that differ between the samples (D-STEP's frames, clips of a batch) split a layer into one run a
sample, each of which packs the weights of its channels and streams them again. With few positions a sample that costs
more than the skipped multiply-adds; then the layer runs over the whole batch and masks do their work elsewhere.

Dead positions of the input remove taps from the positions that would read them in direct kernels, and whole tiles in
Winograd kernels from the input's side (``winograd_inputs``), which cost more than others where nothing is dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from dance_tvm.liveness.expressions import Live
from dance_tvm.schedules.cpu.conv3d_gather import GatherConv
from dance_tvm.schedules.cpu.cost import axis_densities
from dance_tvm.schedules.cpu.row_plan import RowPlan
from dance_tvm.schedules.cpu.tiles import Machine, default_tile
from dance_tvm.schedules.cpu.winograd_choice import transformed, why_no_winograd
from dance_tvm.schedules.cpu.winograd_space import best
from dance_tvm.schedules.emit import FLOAT
from dance_tvm.schedules.plans import MOST_DYNAMIC_POSITION_TAPS

from .sites import Site, SiteLists

#: Lists must be predicted to take at most this share of the time without them, in the mean over the masks that are
#: expected (``cost.ASSUMED_LEFT``); with masks that leave everything they cost a little. Those of positions, whose cost
#: is in the prediction, need only be faster.
WORTH_LISTING = 0.95


@dataclass(frozen=True)
class SampleLists:
    """Decides for a machine and a number of threads; ``algorithm`` is auto, direct or winograd.

    ``dtype`` is what the network stores; layers whose range keeps them in float32 are judged by it too.
    """

    machine: Machine
    threads: int
    algorithm: str
    dtype: str = FLOAT

    def __call__(self, site: Site, alive: Live, wanted: Live) -> SiteLists:
        """Which of the lists that masks allow the site walks."""
        window = site.window
        there = SiteLists(
            alive.channels is not None, wanted.channels is not None, positions_of_input(site, alive) is not None
        )
        if site.groups > 1 or site.whole:
            return SiteLists(there.inputs, there.outputs, False)
        options = [SiteLists(there.inputs, there.outputs)]
        if window.batch > 1:  # one sample's lists of channels cost nothing but themselves
            sides = product(*([False, True] if side else [False] for side in there[:2]))
            options = [SiteLists(*listed) for listed in sides]
        # A channel that is left out takes a share of whatever the other masks leave, so that lists of channels are
        # judged by the masks of channels alone.
        channels = self._worthwhile(site, Live(channels=alive.channels), Live(channels=wanted.channels), options)
        if not there.positions:
            return channels
        return self._worthwhile(site, alive, wanted, [channels, channels._replace(positions=True)], worth=1.0)

    def _worthwhile(
        self, site: Site, alive: Live, wanted: Live, options: Sequence[SiteLists], worth: float = WORTH_LISTING
    ) -> SiteLists:
        """The fastest of ``options`` under these masks, or the first where none is ``worth`` its lists."""
        plain, *others = options
        if not others:
            return plain
        seconds = {lists: self._seconds(site, alive, wanted, lists) for lists in options}
        fastest = min(seconds, key=lambda lists: seconds[lists])
        return fastest if seconds[fastest] < worth * seconds[plain] else plain

    def _seconds(self, site: Site, alive: Live, wanted: Live, lists: SiteLists) -> float:
        """Predicted time of the faster of the direct and the Winograd kernel."""
        window, machine = site.window, self.machine
        samples = window.batch if lists.inputs or lists.outputs else 1
        channels = site.channels_in, site.channels_out
        tile = default_tile(machine.storing(self.dtype), window, *channels, threads=samples * self.threads)
        plan = RowPlan(
            window,
            tile.mr,
            tile.block_tiles,
            tile.segment_taps,
            samples,
            alive.frames is not None,
            wanted.frames is not None,
            None if wanted.positions is None else (wanted.positions.shape[0], wanted.positions.shape[1]),
            positions_of_input(site, alive) if lists.positions else None,
        )
        conv = GatherConv(window, *channels, 1, tile, plan, lists.inputs, lists.outputs, dtype=self.dtype)
        # All axes that masks thin, whichever of them the kernel makes use of: they leave the expected share together.
        axes = (alive.channels, alive.frames, positions_of_input(site, alive), *vars(wanted).values())
        densities = axis_densities(axes)
        direct = conv.predict(machine, self.threads, densities)
        if self.algorithm == "direct" or why_no_winograd(conv):
            return direct
        found = best(transformed(conv), machine, self.threads, densities)
        return min(direct, found.predict(machine, self.threads, densities)) if found else direct


def positions_of_input(site: Site, alive: Live) -> tuple[int, int] | None:
    """How many clips and frames the mask of the input's positions tells apart; None where no kernel can use it."""
    window = site.window
    whole_frames = (window.kernel[0], window.stride[0], window.padding[0]) == (1, 1, 0)
    if alive.positions is None or not whole_frames or window.taps > MOST_DYNAMIC_POSITION_TAPS:
        return None
    return alive.positions.shape[0], alive.positions.shape[1]
