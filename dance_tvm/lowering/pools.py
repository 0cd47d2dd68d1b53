"""Max pools behind convolutions whose kernels compute both: what only the pool reads is not stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import relax

from dance_tvm.ir.graph import Graph
from dance_tvm.ir.windows import MAX_POOLS, window_of
from dance_tvm.liveness.expressions import Live
from dance_tvm.schedules.geometry import side_by_side
from dance_tvm.schedules.layer import Limits

from .choose_kernel import Chooser
from .sites import PoolBehind, Site, Sites

#: The limits of all sites' memory, as things stand.
ShareOut = Callable[[], Mapping[relax.Var, Limits]]


def absorb_pools(graph: Graph, sites: Sites, chooser: Chooser, share_out: ShareOut) -> None:
    """Let each site whose kernel can end behind the max pool that alone reads its result do so, and set the limits of
    memory.

    Which kernel a site gets depends on the limits, and these on what activations take, less where pools are taken in.
    So pools that a limit turns out to forbid are given up until none is.
    """
    chooser.limits = share_out()
    found = [(site, pool) for site in sites.by_end.values() if (pool := _pool_behind(graph, sites, site, chooser))]
    able = [(site, pool) for site, pool in found if chooser.pooled(site, pool) is not None]
    while able:
        for site, pool in able:
            site.pool = pool
        chooser.limits = share_out()
        still = [(site, pool) for site, pool in able if chooser.pooled(site, pool) is not None]
        if len(still) == len(able):
            break
        for site, _ in able:
            site.pool = None
        able = still
        if not able:
            chooser.limits = share_out()
    for site, pool in able:
        del sites.by_end[site.end]
        sites.inside.update([site.end, *pool.between])
        site.absorbed += [*pool.between, pool.end]
        site.end = pool.end
        sites.by_end[pool.end] = site


def _pool_behind(graph: Graph, sites: Sites, site: Site, chooser: Chooser) -> PoolBehind | None:
    """The max pool that alone reads the site's result, or its products with masks, in windows side by side."""
    between: list[relax.Var] = []
    reader = graph.only_reader(site.end)
    while reader is not None and reader in sites.aliases:
        between.append(reader)
        reader = graph.only_reader(reader)
    if reader is None or graph.op(reader) not in MAX_POOLS or site.residual is not None or site.whole:
        return None
    window, data = window_of(graph, reader), between[-1] if between else site.end
    taken = reader in sites.aliases or any(reader in bindings for bindings in sites.chained.values())
    if window is None or window != side_by_side(site.window, window.kernel) or taken:
        return None
    alive, wanted = sites.liveness.alive_in(data), sites.wanted(site)
    dead = Live(alive.frames, alive.positions)
    if wanted & dead != wanted:  # zeros that the kernel would not know of
        return None
    together = not site.masked and not dead.axes
    same = chooser.dtype_of(site) == chooser.dtype_of_pool(site.end)
    return PoolBehind(reader, window, tuple(between), together) if same else None
