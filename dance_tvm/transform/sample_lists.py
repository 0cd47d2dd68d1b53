"""Which channel lists pay where every sample of a batch has its own.

Lists of channels that differ between the samples (D-STEP's frames, clips of a batch) split a layer into one run a
sample, each of which packs the weights of its channels and streams them again. With few positions a sample that costs
more than the skipped multiply-adds; then the layer runs over the whole batch and masks do their work elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from dance_tvm.schedules.conv3d_gather import GatherConv
from dance_tvm.schedules.row_plan import RowPlan
from dance_tvm.schedules.tiles import Machine, default_tile
from dance_tvm.schedules.winograd_choice import best, direct_seconds, why_not, winograd_seconds

from .masks import Live
from .sites import Site

#: Lists must be predicted to take at most this share of the time without them, in the mean over the masks that are
#: expected (``winograd_choice.ASSUMED_LEFT``); with masks that leave everything they cost a little.
WORTH_LISTING = 0.92


@dataclass(frozen=True)
class SampleLists:
    """Decides for a machine and a number of threads; ``convolution`` is auto, direct or winograd."""

    machine: Machine
    threads: int
    convolution: str

    def __call__(self, site: Site, alive: Live, wanted: Live) -> tuple[bool, bool]:
        """Whether to list live input channels, and whether to list live output channels."""
        there = (alive.channels is not None, wanted.channels is not None)
        if site.window.batch == 1 or site.groups > 1 or site.linear or not any(there):
            return there
        inputs, outputs = ({False, listed} for listed in there)
        options = [(of_input, of_output) for of_input in inputs for of_output in outputs]
        seconds = {lists: self._seconds(site, alive, wanted, lists) for lists in options}
        fastest = min(seconds, key=lambda lists: seconds[lists])
        return fastest if seconds[fastest] < WORTH_LISTING * seconds[False, False] else (False, False)

    def _seconds(self, site: Site, alive: Live, wanted: Live, lists: tuple[bool, bool]) -> float:
        """Predicted time of the faster of the direct and the Winograd kernel."""
        window, machine = site.window, self.machine
        tile = default_tile(machine, window, site.channels_in, site.channels_out)
        positions = None if wanted.positions is None else wanted.positions.shape[:2]
        plan = RowPlan(
            window,
            tile.mr,
            tile.block_tiles,
            tile.segment_taps,
            window.batch if any(lists) else 1,
            alive.frames is not None,
            wanted.frames is not None,
            positions,  # type: ignore[arg-type]
        )
        conv = GatherConv(window, site.channels_in, site.channels_out, 1, tile, plan, *lists)
        found = best(conv, machine, self.threads) if self.convolution != "direct" and not why_not(conv) else None
        direct = direct_seconds(conv, machine, self.threads)
        return min(direct, winograd_seconds(found, machine, self.threads)) if found else direct
