"""What a build says of each layer: its kernel, what it skips, and why not more; and of each compiled function."""

from __future__ import annotations

import tvm
from tvm import tirx

from dance_tvm.artifact.layers import KernelInfo, LayerInfo
from dance_tvm.ir.graph import Graph
from dance_tvm.liveness.analysis import Liveness
from dance_tvm.liveness.expressions import Live
from dance_tvm.liveness.kernel_groups import KernelGroups
from dance_tvm.schedules.convolution import LayerKernel
from dance_tvm.schedules.kernel import described
from dance_tvm.schedules.layer import Choice

from .sites import Site

#: Share of zero weights from which on a layer's report says why they are not skipped.
WORTH_TELLING = 0.01


def describe(
    site: Site, choice: Choice[LayerKernel], alive: Live, wanted: Live, groups: KernelGroups | None, why: str
) -> LayerInfo:
    """The layer of a site; ``groups`` are those of its weights, ``why`` says why no mask thins it."""
    kernel = choice.kernel
    takers = [*(each.planner for each in kernel.lists()), kernel]
    taken = {operand.axis for each in takers for operand in each.inputs()}
    skips = [f"input {axis}" for axis in alive.axes if f"in_{axis}" in taken]
    skips += [f"output {axis}" for axis in wanted.axes]
    skips += kernel.skips
    reasons = ["" if skips else why]
    if groups is not None and (groups.scheme != "dense" or groups.zeros >= WORTH_TELLING):
        reasons.append(str(groups))
    if site.unlisted:
        reasons.append(f"its {' and '.join(site.unlisted)} channels differ by sample, and listing them would not pay")
    reasons.append(choice.reason)
    return LayerInfo(
        name=site.start.name,
        kind="linear" if site.linear else "conv3d",
        kernel=kernel.name,
        macs=site.macs,
        skips=skips,
        reason="; ".join(filter(None, reasons)),
        tuned=choice.origin,
        scratch_bytes=kernel.scratch_bytes,
    )


def kernels_of(mod: tvm.IRModule) -> dict[str, KernelInfo]:
    """The functions of a module by their symbols; for TVM's own functions nothing else is known."""
    functions = {gvar.name_hint: func for gvar, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
    return {symbol: KernelInfo(**(described(functions[symbol]) or {})) for symbol in sorted(functions)}


def why_dense(site: Site, graph: Graph, liveness: Liveness) -> str:
    """Why no mask thins a site."""
    refused = liveness.masks.refused
    for var in [site.end, site.data]:
        for reader in [*graph.readers.get(var, []), var]:
            if graph.op(reader) == "multiply":
                for arg in graph.call(reader).args:
                    if arg in refused:
                        return refused[arg]
    return "no mask reaches it"
