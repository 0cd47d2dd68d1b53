"""``--memory small``: a limit for the whole network, spent on those layers where a byte saves most time.

A transform that multiplies the weights of an early layer costs little and saves much, as that layer has few weights and
many positions; in late layers it is the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from dance_tvm.schedules.cpu.choice import memory_trades
from dance_tvm.schedules.cpu.tiles import Machine
from dance_tvm.schedules.layer import Limits

from .choose_kernel import Chooser
from .sites import Site

#: The weights of the whole network may grow by this share of them when they are prepared, or by so many bytes, which
#: are nothing to any machine.
MOST_GROWTH, SMALL_BYTES = 0.17, 2 << 20
#: Scratch that every layer may have; beyond it, what the arena has anyway for the layer with the largest activations.
SCRATCH_BYTES = 8 << 20
#: Parts into which that is divided for the choice.
PARTS = 512

#: Bytes that are spent and the seconds that a call takes then.
Trade = tuple[float, float]


def shared_out(chooser: Chooser, machine: Machine) -> dict[relax.Var, Limits]:
    """The limits of each site, by its ``start``."""
    sites = list(chooser.sites.by_end.values())
    room = max(SMALL_BYTES, MOST_GROWTH * sum(site.weight.nbytes for site in sites))
    largest = max((_activations(site) for site in sites), default=0)
    limits, trades = {}, []
    for site in sites:
        scratch = float(max(SCRATCH_BYTES, largest - _activations(site)))  # what the arena has beside these
        growths = memory_trades(chooser.layer(site), machine, chooser.log, scratch)
        limits[site.start] = [Limits(growth, scratch, anew=True) for growth, _ in growths]
        trades.append([((growth - 1) * site.weight.nbytes, seconds) for growth, seconds in growths])
    spent = spend(trades, room)
    return {start: allowed[taken] for (start, allowed), taken in zip(limits.items(), spent, strict=True)}


def spend(trades: Sequence[Sequence[Trade]], room: float) -> list[int]:
    """Which trade each layer makes so that all take at most ``room`` bytes together and the seconds are fewest.

    The first trade of each costs nothing. Bytes are counted in parts of ``room``, rounded up.
    """
    least, taken = np.zeros(PARTS + 1), []
    for options in trades:
        sums = np.full((len(options), PARTS + 1), np.inf)
        for index, (spent, seconds) in enumerate(options):
            parts = int(np.ceil(PARTS * spent / room))
            if parts <= PARTS:
                sums[index, parts:] = least[: PARTS + 1 - parts] + seconds
        taken.append(sums.argmin(axis=0))
        least = sums.min(axis=0)
    chosen, left = [], PARTS
    for options, best in zip(reversed(trades), reversed(taken), strict=True):
        index = int(best[left])
        left -= int(np.ceil(PARTS * options[index][0] / room))
        chosen.append(index)
    return chosen[::-1]


def _activations(site: Site) -> int:
    """Bytes that a site reads and writes."""
    window = site.window
    return 4 * (window.positions_in * site.channels_in + window.positions_out * site.channels_out)
