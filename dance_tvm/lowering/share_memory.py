"""``--memory small`` and ``balanced``: a limit for the whole network, spent where a byte saves most time.

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

#: small: the weights of the whole network may grow by this share of them when they are prepared, or by so many bytes,
#: which are nothing to any machine. Where activations take little, by as much as makes the growth and the arena this
#: share together.
MOST_GROWTH, SMALL_BYTES, MOST_BESIDE = 0.17, 2 << 20, 0.38
#: balanced: by this share, or, where it is more, by as much as they grow when layers of more than so many bytes, the
#: large ones, have this limit (tiles of two along every axis, or of three along two). Others have none.
BALANCED_GROWTH, LARGE_BYTES, LARGE = 0.75, 8 << 20, Limits(growth=2.4)
#: Scratch that every layer may have; beyond it, what the arena has anyway for the layer with the largest activations,
#: and this share of the network's weights if it is more.
SCRATCH_BYTES, ARENA = 8 << 20, 0.092
#: Parts into which that is divided for the choice.
PARTS = 512

#: Bytes that are spent and the seconds that a call takes then.
Trade = tuple[float, float]


def shared_out(chooser: Chooser, machine: Machine) -> dict[relax.Var, Limits]:
    """The limits of each site, by its ``start``, in the chooser's ``memory``; none where layers may have what they
    like."""
    sites = list(chooser.sites.by_end.values())
    if chooser.memory == "small":
        return _small(chooser, machine, sites)
    if chooser.memory == "balanced" and any(site.weight.nbytes > LARGE_BYTES for site in sites):
        return _balanced(chooser, machine, sites)
    return {}


def _small(chooser: Chooser, machine: Machine, sites: Sequence[Site]) -> dict[relax.Var, Limits]:
    """Scratch is limited too, and may hold weights that are transformed in every call."""
    weights = _weight_bytes(sites)
    arena = max(ARENA * weights, *map(_activations, sites), 0)
    allowed = []
    for site in sites:
        scratch = float(max(SCRATCH_BYTES, arena - _activations(site)))  # what the arena has beside these
        growths = memory_trades(chooser.layer(site), machine, chooser.log, Limits(scratch=scratch, anew=True))
        allowed.append([(Limits(growth, scratch, anew=True), seconds) for growth, seconds in growths])
    return _limits(sites, allowed, max(SMALL_BYTES, MOST_GROWTH * weights, MOST_BESIDE * weights - arena))


def _balanced(chooser: Chooser, machine: Machine, sites: Sequence[Site]) -> dict[relax.Var, Limits]:
    """Layers that are not large have no limit, and the large ones share what these leave.

    As if masks left everything: what they leave is not known, and none may make a layer slower than it is without any.
    """
    room, least, large, allowed = BALANCED_GROWTH * _weight_bytes(sites), 0.0, [], []
    for site in sites:
        trades = memory_trades(chooser.layer(site).unmasked, machine, chooser.log, Limits())
        if site.weight.nbytes <= LARGE_BYTES:
            room -= (max(growth for growth, _ in trades) - 1) * site.weight.nbytes
        else:
            least += (max(growth for growth, _ in trades if growth <= LARGE.growth) - 1) * site.weight.nbytes
            large.append(site)
            allowed.append([(Limits(growth), seconds) for growth, seconds in trades])
    return _limits(large, allowed, room) if room > least else {site.start: LARGE for site in large}


def _limits(
    sites: Sequence[Site], allowed: Sequence[Sequence[tuple[Limits, float]]], room: float
) -> dict[relax.Var, Limits]:
    """Those of the limits allowed, each with the seconds that a call takes then, with which all take ``room`` bytes."""
    trades = [
        [(max(0.0, limits.growth - 1) * site.weight.nbytes, seconds) for limits, seconds in options]
        for site, options in zip(sites, allowed, strict=True)
    ]
    taken = spend(trades, room)
    return {site.start: options[index][0] for site, options, index in zip(sites, allowed, taken, strict=True)}


def _weight_bytes(sites: Sequence[Site]) -> int:
    """Bytes of the weights of the whole network."""
    return sum(site.weight.nbytes for site in sites)


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
    written = (window if site.pool is None else site.pool.window).positions_out
    return 4 * (window.positions_in * site.channels_in + written * site.channels_out)
