"""The compiler's order of passes, read in one screen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

import tvm
import tvm_ffi
from tvm import relax

from dance_tvm.artifact.layers import LayerInfo
from dance_tvm.compiler.requests import require_buildable
from dance_tvm.core.errors import DanceError
from dance_tvm.ir.reasons import Reasons
from dance_tvm.lowering.choose_kernel import Memory
from dance_tvm.lowering.describe_layers import kernels_of
from dance_tvm.lowering.lower_attention import LowerAttention
from dance_tvm.lowering.lower_norms import LowerNorms
from dance_tvm.lowering.lower_points import LowerPoints
from dance_tvm.lowering.lower_resampling import LowerResampling
from dance_tvm.lowering.lower_sorts import LowerSorts
from dance_tvm.lowering.lower_windows import lower_windows
from dance_tvm.lowering.lowered import LayerCall, Lowered
from dance_tvm.lowering.machine import gpu_of, machine_for
from dance_tvm.records.group_log import group_cost
from dance_tvm.schedules.cpu.choice import TuningLog
from dance_tvm.schedules.cpu.tiles import Machine, candidates
from dance_tvm.schedules.gpu.tiles import Gpu
from dance_tvm.transform.boolean_logic import boolean_logic
from dance_tvm.transform.channels_last import ChannelsLast
from dance_tvm.transform.compute_empty import ComputeEmpty
from dance_tvm.transform.fold_batch_norm import FoldBatchNorm
from dance_tvm.transform.fold_lists import FoldLists
from dance_tvm.transform.fold_pads import FoldPads
from dance_tvm.transform.fold_patches import FoldPatches
from dance_tvm.transform.gpu_rest import ScheduleRestForGpu
from dance_tvm.transform.infinite_fills import infinite_fills
from dance_tvm.transform.join_copies import JoinCopies
from dance_tvm.transform.join_small import JoinSmall
from dance_tvm.transform.keep_nan import KEEP_NAN
from dance_tvm.transform.lift_weights import LiftWeights
from dance_tvm.transform.narrow_channels import NarrowChannels
from dance_tvm.transform.norms_before_concat import NormsBeforeConcat
from dance_tvm.transform.norms_by_clip import NormsByClip
from dance_tvm.transform.schedule_rest import ScheduleRest
from dance_tvm.transform.short_names import ShortNames
from dance_tvm.transform.spread_transposed import SpreadTransposed
from dance_tvm.transform.store_halves import StoreHalves
from dance_tvm.transform.unsigned_signs import unsigned_signs
from dance_tvm.transform.vector_math import VectorMath
from dance_tvm.transform.whole_division import WHOLE_DIVISION
from dance_tvm.transform.whole_pools import WholePools
from dance_tvm.transform.whole_powers import whole_powers
from dance_tvm.transform.widen_sequences import WidenSequences

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target

# Passes run inside TVM, which else turns what they raise into a RuntimeError.
tvm_ffi.register_error("DanceError", DanceError)


@dataclass(frozen=True)
class Options:
    """What a build may choose. ``dtype`` auto is float16 where the target has it and the check passes, else float32.
    ``io`` float16 takes and gives in half precision what the source has in float32.
    ``kernel_group``: filters and channels of the kernel groups in which zero weights are left out, whatever that costs,
    in place of the cheapest; (1, 1) leaves out none. ``logs``: the only folder of tuning logs to use, in place of the
    usual ones; ``cache``: whether kernels are taken from and kept in the user's cache, which changes no byte of the
    result."""

    threads: int = 1
    numerics: Literal["fast", "exact"] = "fast"
    conv: Literal["auto", "direct", "winograd"] = "auto"
    sparsity: Literal["auto", "off"] = "auto"
    kernel_group: tuple[int, int] | None = None
    debug_dump: Path | None = None
    tuning: TuningLog | None = None
    logs: Path | None = None
    dtype: Literal["float32", "float16", "auto"] = "float32"
    io: Literal["source", "float16"] = "source"
    memory: Memory = "balanced"
    weights_dtype: Literal["float32", "float16"] = "float32"
    prepared: bool = False
    static: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        """Raise DanceError for a value that its option does not have, which else nothing would look at."""
        for name, kind in get_type_hints(Options).items():
            value, allowed = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and value not in allowed:
                raise DanceError(f"{name} is {', '.join(allowed[:-1])} or {allowed[-1]}, not {value!r}")
            if kind is bool and not isinstance(value, bool):
                raise DanceError(f"{name} is True or False, not {value!r}")
        if not isinstance(self.threads, int) or self.threads < 1:
            raise DanceError(f"threads is how many a call takes, at least 1, not {self.threads!r}")
        if self.logs is not None:
            object.__setattr__(self, "logs", Path(self.logs))


#: Of a module, the largest magnitude of each variable, by its name.
Measure = Callable[[tvm.IRModule], Mapping[str, float]]


def lower(
    mod: tvm.IRModule,
    target: Target,
    options: Options,
    on_phase: Callable[[str], None] | None = None,
    measure: Measure | None = None,
) -> Lowered:
    """Turn an imported Relax module into one whose every operator has a kernel for ``target``; ``measure`` says which
    layers half precision has the range for."""
    machine, gpu = machine_for(target, mod), gpu_of(target)
    require_buildable(target, options.dtype)
    if options.kernel_group and gpu is None:
        _require_group(options.kernel_group, {machine, machine.storing(options.dtype)})
    lift_weights, reasons = LiftWeights(), Reasons()
    phases = _Phases(on_phase, options.debug_dump)
    source = mod
    with target.tvm_target(options.threads), tvm.transform.PassContext(opt_level=3):
        spread = [] if gpu is None else [SpreadTransposed(reasons)]
        narrow = [NarrowChannels(reasons)] if options.sparsity == "auto" else []
        last = ChannelsLast(reasons, planar=gpu is None and options.dtype == "float32")
        layouts = [last] if gpu else [FoldPatches(reasons), last]
        for name, passes in _before_kernels(spread, narrow, layouts, reasons):
            mod = phases.run(name, mod, passes)
            source = mod if name == LAST_WITH_NAMES else source
        phases.begin("sparse kernels")
        windows = lower_windows(
            mod,
            gpu or machine,
            sparsity=options.sparsity == "auto",
            threads=options.threads,
            tuning=options.tuning,
            algorithm="direct" if options.numerics == "exact" else options.conv,
            group=options.kernel_group,
            group_cost=partial(group_cost, target, options.threads, options.logs),
            dtype=options.dtype,
            memory="fast" if gpu else options.memory,
            largest=measure(source) if measure and options.dtype == "float16" and not gpu else {},
        )
        phases.end("sparse kernels", mod := windows.mod)
        behind = _behind_kernels(machine, gpu, options.threads, reasons)
        for name, passes in [*behind, ("lift weights", [lift_weights])]:
            mod = phases.run(name, mod, passes)
    phases.write_reasons(reasons)
    layers = [_with_reason(layer, reasons.of(layer.name)) for layer in windows.layers]
    layers = _as_called(layers, windows.calls, mod)
    found = windows.workloads, windows.sources, kernels_of(mod), windows.calls, source, windows.limits
    return Lowered(mod, layers, lift_weights.weights, *found, machine)


def _require_group(group: tuple[int, int], machines: Collection[Machine]) -> None:
    """Raise DanceError unless kernels compute groups of so many filters, which fill vectors, on all ``machines``: a
    processor as its layers in either precision see it."""
    each = [{vectors * one.vector_floats for _, vectors, _ in candidates(one)} for one in machines]
    filters = sorted(set.intersection(*each))
    sizes = isinstance(group, tuple) and [type(size) for size in group] == [int, int]
    if not sizes or min(group) < 1 or (group[0] not in filters and group != (1, 1)):
        raise DanceError(
            f"kernel_group is filters and channels, as ({filters[0]}, 4), not {group!r}: this target has groups "
            f"of {', '.join(map(str, filters[:-1]))} or {filters[-1]} filters"
        )


Passes = list[tvm.transform.Pass]

#: The last phase behind which layouts are the source's, so that PyTorch can evaluate the module.
LAST_WITH_NAMES = "fold batch norm"


def _before_kernels(spread: Passes, narrow: Passes, layouts: Passes, reasons: Reasons) -> list[tuple[str, Passes]]:
    """What is done to the network while its operators are still those of the source."""
    return [
        (
            "simplify",
            [
                relax.transform.CanonicalizeBindings(),
                boolean_logic,
                infinite_fills,
                whole_powers,
                unsigned_signs,
                relax.transform.FoldConstant(),
                WidenSequences(),
                relax.transform.DeadCodeElimination(),
                *spread,
            ],
        ),
        (
            LAST_WITH_NAMES,
            [
                WholePools(reasons),
                FoldPads(reasons),
                NormsByClip(reasons),
                NormsBeforeConcat(reasons),
                FoldBatchNorm(reasons),
                *narrow,
            ],
        ),
        (
            "channels last",
            [*layouts, relax.transform.FoldConstant(), relax.transform.DeadCodeElimination()],
        ),
    ]


def _behind_kernels(machine: Machine, gpu: Gpu | None, threads: int, reasons: Reasons) -> list[tuple[str, Passes]]:
    """What is done to the operators that no sparse kernel took."""
    halves = [] if gpu else [StoreHalves()]
    products = [LowerAttention(machine, threads, reasons), LowerResampling(machine, threads, reasons)]
    products = [] if gpu else [*products, LowerPoints(machine, threads)]
    return [
        (
            "norms and sorts",
            [
                FoldLists(),
                *halves,
                *products,
                LowerNorms(gpu or machine, threads, reasons),
                *halves,
                LowerSorts(gpu or machine, threads),
            ],
        ),
        (
            "other operators",
            [
                *([] if gpu else [JoinCopies(machine.vector_floats, threads, reasons)]),
                ComputeEmpty(),
                relax.transform.DecomposeOpsForInference(),
                relax.transform.LegalizeOps({**KEEP_NAN, **WHOLE_DIVISION}),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                ShortNames(),
                relax.transform.DeadCodeElimination(),
                ScheduleRestForGpu() if gpu else ScheduleRest(machine.vector_floats, threads),
                *([] if gpu else [JoinSmall(reasons), VectorMath()]),
            ],
        ),
    ]


@dataclass
class _Phases:
    """Reports each phase to ``tell``, and writes the module after it to the folder ``dump`` if there is one."""

    tell: Callable[[str], None] | None
    dump: Path | None
    done: int = 0

    def run(self, name: str, mod: tvm.IRModule, passes: Passes) -> tvm.IRModule:
        """``mod`` after the passes of a phase."""
        self.begin(name)
        for each in passes:
            mod = each(mod)
        self.end(name, mod)
        return mod

    def begin(self, name: str) -> None:
        """Report that a phase begins."""
        if self.tell:
            self.tell(name)

    def end(self, name: str, mod: tvm.IRModule) -> None:
        """Write the module after the phase."""
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            path = self.dump / f"{self.done}-{name.replace(' ', '-')}.py"
            path.write_text(mod.script(show_meta=False), encoding="utf-8")
        self.done += 1

    def write_reasons(self, reasons: Reasons) -> None:
        """Write which operators passes declined to change, and why, beside the modules."""
        if self.dump is not None:
            (self.dump / "reasons.txt").write_text("".join(f"{line}\n" for line in reasons), encoding="utf-8")


def _as_called(layers: list[LayerInfo], calls: Mapping[str, LayerCall], mod: tvm.IRModule) -> list[LayerInfo]:
    """``layers`` with those that have calls of their own in the order of these, which passes may have changed; others,
    which small kernels were joined of, stay where they are."""
    bindings = [binding.var.name for block in mod["main"].body.blocks for binding in block.bindings]
    place = {name: index for index, name in enumerate(bindings)}
    own = [layer for layer in layers if calls[layer.name].var in place]
    ordered = iter(sorted(own, key=lambda layer: place[calls[layer.name].var]))
    return [next(ordered) if calls[layer.name].var in place else layer for layer in layers]


def _with_reason(layer: LayerInfo, reason: str) -> LayerInfo:
    """``layer`` with one more thing that was decided about it."""
    joined = "; ".join(part for part in (reason, layer.reason) if part)
    return layer.model_copy(update={"reason": joined})
