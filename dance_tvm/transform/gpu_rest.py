"""Schedule what has no kernel of its own for a GPU: elementwise operators, reductions, copies."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight

from dance_tvm.core.errors import DanceError
from dance_tvm.ir.graph import is_scheduled


class _OrNone(dlight.ScheduleRule):
    """A rule of TVM's, which does not fit where it fails within: at some means of everything, at tensors of nothing."""

    def __init__(self, rule: dlight.ScheduleRule) -> None:
        self.rule = rule

    def apply(self, func: tirx.PrimFunc, target: tvm.target.Target, tunable: bool) -> s_tir.Schedule | None:
        """The schedule by the rule; None where the next one is to be tried."""
        try:
            return self.rule.apply(func, target, tunable)
        except tvm.error.InternalError:
            return None


@tvm.transform.module_pass(opt_level=0, name="ScheduleRestForGpu")
class ScheduleRestForGpu:
    """Bind the loops of every unscheduled PrimFunc to blocks and threads, by TVM's own rules."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Schedule each function. Raises DanceError for one that no rule fits: it could not run on a GPU."""
        rules = [_OrNone(rule()) for rule in (dlight.gpu.Reduction, dlight.gpu.GeneralReduction, dlight.gpu.Fallback)]
        copy = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)  # TVM's pass changes the module it is given
        mod = dlight.ApplyDefaultSchedule(*rules)(copy)
        for name, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and not is_scheduled(func):
                raise DanceError(
                    f"{name.name_hint} has no GPU schedule: build this network for a CPU target, or export it without"
                )
        return mod
