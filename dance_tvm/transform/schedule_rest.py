"""Schedule what has no kernel of its own: elementwise operators, reductions, copies."""

from __future__ import annotations

import math
from contextlib import suppress

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV
from tvm.sym import Analyzer
from tvm_ffi import structural_walk

from dance_tvm.ir.graph import is_scheduled
from dance_tvm.schedules.cpu.transpose import Transpose, transpose
from dance_tvm.schedules.emit import FLOAT, HALF

#: Functions with less work than this run on one thread: waking the others costs more.
PARALLEL_ELEMENTS = 16384

#: By how many nodes an expression may grow its one reader that reads it more than once: in a chain of such readers
#: each link would double what is written.
INLINED_NODES = 256

#: Rows shorter than this are not cut into vectors of their own.
NARROWEST = 4


@tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
class ScheduleRest:
    """Spread the elements of every unscheduled PrimFunc over threads and vector lanes."""

    def __init__(self, vector_floats: int, threads: int = 1) -> None:
        self.vector_floats, self.threads = vector_floats, threads

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Schedule each function; one that TVM's primitives refuse stays as it was."""
        functions = dict(mod.functions_items())
        for name, func in functions.items():
            if isinstance(func, tirx.PrimFunc) and not is_scheduled(func):
                functions[name] = self._scheduled(func, name.name_hint).with_attr("tirx.is_scheduled", True)
        return tvm.IRModule(functions, attrs=mod.attrs)

    def _scheduled(self, func: tirx.PrimFunc, name: str) -> tirx.PrimFunc:
        schedule = s_tir.Schedule(func)
        try:
            root = schedule.get_sblock("root")
        except s_tir.ScheduleError:
            return _bare(func)  # TVM's own loops, as those of scatter, which have no blocks to schedule
        for block in reversed(schedule.get_child_blocks(root)):  # so that what several links of a chain read has one
            _inline(schedule, block)  # reader by its turn
        blocks = schedule.get_child_blocks(root)
        if len(blocks) == 1 and (kernel := self._change_of_layout(func, schedule.get(blocks[0]), name)):
            return kernel
        for block in blocks:
            if schedule.get_loops(block):
                with suppress(s_tir.ScheduleError):
                    self._spread(schedule, block)
        return schedule.mod["main"]

    def _change_of_layout(self, func: tirx.PrimFunc, block: s_tir.SBlock, name: str) -> tirx.PrimFunc | None:
        """The kernel for ``func`` if all its one block does is to move axes of a large tensor of floats, by vectors,
        and to store it in single or half precision."""
        found = _moved_axes(func, block)
        if found is None or math.prod(found[0]) < PARALLEL_ELEMENTS:
            return None
        shape, order = found
        plan = Transpose.of(shape, order)
        if plan is None or not plan.worthwhile:
            return None
        types = (str(func.params[0].ty.dtype), str(func.params[1].ty.dtype))
        turned = [int(extent) for extent in func.params[1].shape]
        kernel = transpose(plan, shape, turned, self.vector_floats, name, types, self.threads == 1)
        return kernel.without_attr("global_symbol")  # another pass may rename the function that it is, or copy it

    def _spread(self, schedule: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> None:
        loops = schedule.get_loops(block)
        kinds = [int(var.iter_type) for var in schedule.get(block).iter_vars]
        if len(kinds) != len(loops):
            return
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0]
        reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != 0]
        if not spatial or any(schedule.get(loop).extent == 0 for loop in loops):
            return
        schedule.reorder(*spatial, *reduction)
        last = int(schedule.get(spatial[-1]).extent)
        if last % self.vector_floats == 0:  # each axis keeps its loop: an index taken apart again costs divisions
            self._vectorize(schedule, spatial[:-1], spatial[-1], reduction)
        elif reduction or last < NARROWEST:
            self._vectorize(schedule, [], schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0], [*reduction])
        else:
            self._vectorize_parts(schedule, spatial)
        if reduction:
            schedule.decompose_reduction(block, reduction[0])

    def _vectorize(
        self, schedule: s_tir.Schedule, before: list[LoopRV], split: LoopRV, reduction: list[LoopRV]
    ) -> None:
        """Vectors of the loop ``split``, the loops ``before`` it and its own spread over threads."""
        elements = math.prod(int(schedule.get(loop).extent) for loop in [*before, split, *reduction])
        middle, inner = schedule.split(split, [None, self.vector_floats])
        if reduction:
            schedule.reorder(*before, middle, *reduction, inner)
        schedule.vectorize(inner)
        self._parallelize(schedule, before or [middle], elements)

    def _vectorize_parts(self, schedule: s_tir.Schedule, spatial: list[LoopRV]) -> None:
        """Whole vectors of the last of these loops, then what is left of it in vectors of 8, 4, 2 and 1: one loop over
        all elements would take each index apart in every lane."""
        *before, split = spatial
        extents = [int(schedule.get(loop).extent) for loop in spatial]
        parts = _parts(extents[-1], self.vector_floats)
        loops = schedule.loop_partition(split, parts[:-1]) if len(parts) > 1 else [split]
        for loop, part in zip(loops, parts, strict=True):
            inner = loop if part < self.vector_floats else schedule.split(loop, [None, self.vector_floats])[1]
            schedule.vectorize(inner)
        self._parallelize(schedule, before, math.prod(extents))

    def _parallelize(self, schedule: s_tir.Schedule, loops: list[LoopRV], elements: int) -> None:
        if self.threads > 1 and elements >= PARALLEL_ELEMENTS and loops:
            schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])


def _parts(extent: int, lanes: int) -> list[int]:
    """``extent`` as a multiple of ``lanes`` and powers of two below it."""
    whole = extent // lanes * lanes
    powers = (1 << bit for bit in reversed(range(lanes.bit_length())))
    return [whole] * bool(whole) + [power for power in powers if (extent - whole) & power]


def _moved_axes(func: tirx.PrimFunc, block: s_tir.SBlock) -> tuple[list[int], list[int]] | None:
    """The shape of what ``func`` reads, and its axes, less those of extent one, in the order of the result's; None if
    ``block`` does more."""
    if not isinstance(block.body, tirx.BufferStore):
        return None
    load, params = block.body.value, list(func.params)
    if isinstance(load, tirx.Cast):
        load = load.value
    if not isinstance(load, tvm.ir.expr.TensorLoad) or len(params) != 2:
        return None
    source, target = params
    if not (load.source.same_as(source) and block.body.buffer.same_as(target)):
        return None
    if not {str(source.ty.dtype), str(target.ty.dtype)} <= {FLOAT, HALF}:
        return None
    axes = [axis.var for axis in block.iter_vars]
    if len(block.body.indices) != len(axes) or not all(map(_same, block.body.indices, axes)):
        return None
    ranges = Analyzer()
    for axis in block.iter_vars:
        ranges.bind(axis.var, axis.dom)
    read, shape = [ranges.simplify(index) for index in load.indices], [int(extent) for extent in source.shape]
    moved = [axis.var for axis in block.iter_vars if int(axis.dom.extent) > 1]
    order = [next((at for at, index in enumerate(read) if index.same_as(axis)), -1) for axis in moved]
    return (shape, order) if sorted(order) == [at for at, extent in enumerate(shape) if extent > 1] else None


def _same(one: tirx.PrimExpr, other: tirx.PrimExpr) -> bool:
    return bool(one.same_as(other))


def _inline(schedule: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> None:
    """Compute ``block`` where it is read, if one other block reads it and no element more often than it is computed."""
    readers = schedule.get_consumers(block)
    if len(readers) != 1 or _elements(schedule, readers[0]) > _elements(schedule, block):
        return
    producer, reader = schedule.get(block), schedule.get(readers[0])
    loads, nodes = _loads(reader, producer.writes[0].source), _nodes(producer)
    if loads == 1 or (loads - 1) * nodes <= INLINED_NODES:
        with suppress(s_tir.ScheduleError):  # a reduction, or the function's result
            schedule.compute_inline(block)


def _loads(block: s_tir.SBlock, buffer: tirx.Buffer) -> int:
    """How many loads of ``buffer`` are written in ``block``."""
    found: list[tvm.ir.expr.TensorLoad] = []
    structural_walk(block.body, (tvm.ir.expr.TensorLoad, found.append))
    return sum(bool(load.source.same_as(buffer)) for load in found)


def _nodes(block: s_tir.SBlock) -> int:
    """How many nodes the body of ``block`` has as a tree."""
    found: list[object] = []
    structural_walk(block.body, found.append)
    return len(found)


def _elements(schedule: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> int:
    return math.prod(int(schedule.get(loop).extent) for loop in schedule.get_loops(block))


def _bare(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """``func`` without the mark around its statements, of which TVM's own code generator warns the user."""
    block = func.body.block if isinstance(func.body, s_tir.SBlockRealize) else None
    if block is None or not isinstance(block.body, tirx.AttrStmt) or block.body.attr_key != "pragma_scope":
        return func
    parts = (block.init, block.alloc_buffers, block.match_buffers, block.annotations)
    bare = s_tir.SBlock(block.iter_vars, block.reads, block.writes, block.name_hint, block.body.body, *parts)
    return func.with_body(s_tir.SBlockRealize(func.body.iter_values, func.body.predicate, bare))
