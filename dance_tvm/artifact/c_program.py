"""The network's ``main`` as a table for the C interface: one arena with offsets, kernels in the order of their calls.

After TVM's memory planning ``main`` is a straight line of allocations, aliases and calls of kernels. ``program_of``
reads it once; ``Program.source`` prints it as the C that `interface/runtime.c` walks. Nothing is allocated in a call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import tvm
from tvm import relax, tirx

from dance_tvm.artifact.arena import Storage, lay_out, workspace_bytes
from dance_tvm.artifact.c_work import Work, works_as_c, works_of
from dance_tvm.artifact.gpu_launches import DeviceCode, Launch
from dance_tvm.artifact.layers import KernelInfo, LayerInfo, layers_called
from dance_tvm.artifact.weight_store import ALIGNMENT, Store, Stored
from dance_tvm.core.errors import DanceError
from dance_tvm.schedules.preparation import array_digest

#: What the runtime's `dance_kind` calls a type, by the beginning of its name.
_KINDS = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}
#: Parts of one buffer begin at multiples of this; OpenCL's devices want 128 to 512 (CL_DEVICE_MEM_BASE_ADDR_ALIGN).
GPU_ALIGNMENT = 512
_CHECKS = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: ``IN_ARENA`` (in storage ``index``), ``IN_INPUT`` or ``IN_WEIGHT``."""

    where: str
    index: int


@dataclass(frozen=True)
class View:
    """A tensor as a kernel is given it."""

    place: Place
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * _bits(self.dtype) // 8


@dataclass(frozen=True)
class Step:
    """One call of a kernel: its symbol, and tensors or numbers."""

    kernel: str
    arguments: tuple[View | int | float, ...]


@dataclass(frozen=True)
class Launched:
    """One launch of a GPU's kernel, with the tensors that it is given."""

    launch: Launch
    given: tuple[View, ...]


@dataclass
class Program:
    """``main`` as a table; ``workspaces`` are what a processor's kernels take for themselves, each during its step, and
    ``works`` how to count what each step executes."""

    steps: list[Step] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    workspaces: list[Storage] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    inputs: list[View] = field(default_factory=list)
    outputs: list[View] = field(default_factory=list)
    gpu: DeviceCode | None = None
    launches: list[list[Launched]] = field(default_factory=list)
    works: list[list[Work]] = field(default_factory=list)

    def count_work(self, layers: Sequence[LayerInfo], kernels: Mapping[str, KernelInfo]) -> None:
        """Let `profile` count what the steps execute of ``layers``; ``kernels`` by their symbols."""
        called = layers_called(layers, kernels, [step.kernel for step in self.steps])
        for step, layer in zip(self.steps, called, strict=True):
            tensors = [each for each in step.arguments if isinstance(each, View)]
            self.works.append(works_of(kernels.get(step.kernel, KernelInfo()), tensors, layer))

    def run_on_gpu(self, code: DeviceCode) -> None:
        """Let each step launch its kernels of ``code``; their workspaces take room in the arena."""
        self.gpu, self.workspaces = code, []
        for number, step in enumerate(self.steps):
            plan = code.plans[step.kernel]
            spaces = {name: self._workspace(size, number) for name, size in plan.workspaces.items()}
            given = [
                [spaces[ref] if isinstance(ref, str) else step.arguments[ref] for ref in launch.arguments]
                for launch in plan.launches
            ]
            views = [tuple(each for each in row if isinstance(each, View)) for row in given]
            self.launches.append([Launched(*each) for each in zip(plan.launches, views, strict=True)])
        lay_out(self.storages, GPU_ALIGNMENT)

    def _workspace(self, size: int, step: int) -> View:
        self.storages.append(Storage(size, step, step))
        return View(Place("IN_ARENA", len(self.storages) - 1), (size,), "uint8")

    @property
    def arena_bytes(self) -> int:
        """Memory for the activations of one call, and for what kernels take beside them."""
        return max((each.offset + each.bytes for each in [*self.storages, *self.workspaces]), default=0)

    def free_during(self, step: int) -> tuple[int, int]:
        """Offset and bytes of the largest part of the arena in which nothing lies during a step."""
        used = sorted((each.offset, each.bytes) for each in self.storages if each.first <= step <= each.last)
        best, end = (0, 0), 0
        for offset, size in [*used, (self.arena_bytes, 0)]:
            best = max(best, (offset - end, end))
            end = max(end, offset + size + -size % ALIGNMENT)
        return best[1], max(0, best[0])

    def source(self, names: Names, store: Store) -> str:
        """The program as C (`interface/program.h`), with its weights in ``store``."""
        return _Printer(self, names, store).text()


@dataclass(frozen=True)
class Names:
    """What the table calls things: inputs, outputs; a line that describes the build; threads; the instruction sets that
    a processor must have, as Linux names them; and the architecture of an NVIDIA GPU."""

    inputs: list[str]
    outputs: list[str]
    description: str
    threads: int
    instructions: list[str]
    architecture: str = ""


def program_of(mod: tvm.IRModule, weights: Sequence[np.ndarray] = ()) -> Program:
    """Read the planned ``main`` of ``mod``, whose last parameters are the ``weights`` lifted out of it.

    Raises DanceError where ``main`` holds what the C interface cannot express: sizes known only in a call, or calls of
    functions that stand outside the library.
    """
    return _Reader(mod, weights).program


class _Reader:
    """One walk over ``main``."""

    def __init__(self, mod: tvm.IRModule, weights: Sequence[np.ndarray]) -> None:
        self.program = Program()
        self._known: dict[Any, Any] = {}  # variable: View or a tuple of such
        self._placed: dict[bytes, int] = {}  # constants by hash
        kernels = {gvar: func for gvar, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
        self._symbols = {gvar: str(func.attrs["global_symbol"]) for gvar, func in kernels.items()}
        self._workspaces = {self._symbols[gvar]: workspace_bytes(func) for gvar, func in kernels.items()}
        main = mod["main"]
        border = len(main.params) - len(weights)
        for number, param in enumerate(main.params[:border]):
            view = View(Place("IN_INPUT", number), _extents(param.ty.shape), str(param.ty.dtype))
            self._known[param] = view
            self.program.inputs.append(view)
        for param, array in zip(main.params[border:], weights, strict=True):
            self._known[param] = self._constant(array)
        for block in main.body.blocks:
            for binding in block.bindings:
                self._known[binding.var] = self._value(binding.value)
        result = self._value(main.body.body)
        self.program.outputs = list(result) if isinstance(result, tuple) else [result]
        for view in self.program.outputs:
            self._use(view, len(self.program.steps))
        lay_out([*self.program.storages, *self.program.workspaces])

    def _value(self, value: Any) -> Any:
        if isinstance(value, relax.Var):
            return self._known[value]
        if isinstance(value, tvm.ir.GenericConst):
            return self._constant(value.value.numpy())
        if isinstance(value, relax.Tuple):
            return tuple(self._value(each) for each in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value)[value.index]
        if isinstance(value, tirx.IntImm):
            return int(value.value)
        if isinstance(value, tirx.FloatImm):
            return float(value.value)
        if isinstance(value, relax.Call):
            return self._call(value)
        return None  # an object that kernels are not given

    def _call(self, call: relax.Call) -> Any:
        name = getattr(call.op, "name", "")
        if name == "relax.vm.alloc_tensor":
            shape, dtype = call.args[2:4]
            view = View(Place("IN_ARENA", len(self.program.storages)), _extents(shape), str(dtype.value))
            self.program.storages.append(Storage(view.bytes))
            return view
        if name in ("relax.vm.alloc_storage", "relax.vm.kill_object", "relax.null_value"):
            return None  # pieces are as long in use as the single tensors in them
        if isinstance(call.op, tvm.ir.GlobalVar):
            return self._kernel(self._symbols.get(call.op) or _refuse(call.op.name_hint), call.args)
        if name == "relax.call_packed" or isinstance(call.op, relax.ExternFunc):
            return self._packed(call)
        return _refuse(name or str(call.op))

    def _packed(self, call: relax.Call) -> Any:
        name = str(call.op.global_symbol) if isinstance(call.op, relax.ExternFunc) else str(call.args[0].global_symbol)
        arguments = call.args if isinstance(call.op, relax.ExternFunc) else call.args[1:]
        if name in _CHECKS:
            return None
        if name == "vm.builtin.reshape":
            view = self._value(arguments[0])
            return View(view.place, _extents(arguments[1]), view.dtype)
        return _refuse(name)

    def _kernel(self, symbol: str, arguments: Any) -> None:
        values, number = [self._value(argument) for argument in arguments], len(self.program.steps)
        flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
        for value in flat:
            if value is None:
                _refuse(symbol)
            self._use(value, number)
        if taken := self._workspaces[symbol]:
            self.program.workspaces.append(Storage(taken, number, number))
        self.program.steps.append(Step(symbol, tuple(flat)))

    def _use(self, value: Any, step: int) -> None:
        if isinstance(value, View) and value.place.where == "IN_ARENA":
            storage = self.program.storages[value.place.index]
            storage.first = step if storage.first < 0 else storage.first
            storage.last = step

    def _constant(self, array: np.ndarray) -> View:
        key = array_digest(array)
        if key not in self._placed:
            self._placed[key] = len(self.program.weights)
            self.program.weights.append(array)
        return View(Place("IN_WEIGHT", self._placed[key]), array.shape, str(array.dtype))


def _refuse(what: str) -> NoReturn:
    raise DanceError(f"{what} would be called in a run, where only kernels can be: report this network to dance-tvm")


def _extents(shape: Any) -> tuple[int, ...]:
    try:
        return tuple(int(extent) for extent in shape.values)
    except (AttributeError, TypeError):
        raise DanceError(
            "a tensor has a size that is known only during a run: give the inputs their sizes with --shape"
        ) from None


def _bits(dtype: str) -> int:
    return 8 if dtype == "bool" else int("".join(each for each in dtype if each.isdigit()))


class _Printer:
    """A program's tables as C."""

    def __init__(self, program: Program, names: Names, store: Store) -> None:
        self.program, self.names, self.store = program, names, store
        self._tensors: dict[View, int] = {}
        self._shapes: dict[tuple[int, ...], str] = {}
        #: Which output lies in a piece of the arena, from 1 on; of several, the first.
        self._outputs: dict[int, int] = {}
        for number, view in enumerate(program.outputs, start=1):
            if view.place.where == "IN_ARENA":
                self._outputs.setdefault(view.place.index, number)
        for view in [
            *program.inputs,
            *program.outputs,
            *(a for s in program.steps for a in s.arguments if isinstance(a, View)),
            *(view for step in program.launches for each in step for view in each.given),
        ]:
            self._tensors.setdefault(view, len(self._tensors))
        for view in self._tensors:
            for extents in (view.shape, _strides(view.shape)):
                self._shapes.setdefault(extents, f"shape_{len(self._shapes)}")

    def text(self) -> str:
        """The whole file."""
        program, names = self.program, self.names
        arguments = [each for step in program.steps for each in step.arguments]
        kernels = {} if program.gpu else dict.fromkeys(step.kernel for step in program.steps)
        outputs = ", ".join(str(self._tensors[view]) for view in program.outputs)
        parts = [
            '#include "program.h"',
            '#define HIDDEN __attribute__((visibility("hidden")))',
            "extern const unsigned char dance_store[] HIDDEN;",
            *(f"extern int __tvm_ffi_{kernel}(void *, const tvm_any *, int32_t, tvm_any *);" for kernel in kernels),
            *(
                f"static const int64_t {name}[] = {{{', '.join(map(str, shape)) or '0'}}};"
                for shape, name in self._shapes.items()
            ),
            _table("program_tensor", "tensors", [self._tensor(view) for view in self._tensors]),
            _table("program_argument", "arguments", [self._argument(each) for each in arguments]),
            _table("program_step", "steps", self._steps()),
            *works_as_c([each for works in program.works for each in works], self._tensors),
            *self._weights(),
            *self._gpu(),
            _table(
                "dance_tensor",
                "inputs",
                [self._named(*each) for each in zip(names.inputs, program.inputs, strict=True)],
            ),
            _table(
                "dance_tensor",
                "outputs",
                [self._named(*each) for each in zip(names.outputs, program.outputs, strict=True)],
            ),
            f"static const int32_t output_tensors[] = {{{outputs}}};",
            self._program(len(arguments)),
        ]
        return "\n".join(parts) + "\n"

    def _program(self, arguments: int) -> str:
        program, names, store = self.program, self.names, self.store
        outputs = f"outputs, output_tensors, {len(program.outputs)}"
        inline = not store.names
        where = "dance_store" if inline else "NULL"
        needs = ", ".join(map(_quoted, names.instructions)) or "NULL"
        return (
            f"static const char *const instructions[] = {{{needs}}};\n"
            "HIDDEN const dance_program dance_the_program = {\n"
            f"    {_quoted(names.description)}, instructions, {len(names.instructions)},\n"
            f"    {names.threads}, {program.arena_bytes}u,\n"
            f"    tensors, {len(self._tensors)}, arguments, {arguments}, steps, {len(program.steps)}, works,\n"
            f"    weights, {len(store.tensors)}, {where}, {store.size}u, digest,\n"
            f"    inputs, {len(program.inputs)}, {outputs}, {'&gpu' if program.gpu else 'NULL'}}};"
        )

    def _gpu(self) -> list[str]:
        """A GPU's launches, what they are given, and its code, which stands in a file of its own."""
        code = self.program.gpu
        if code is None:
            return []
        launches = [each for step in self.program.launches for each in step]
        rows, first = [], 0
        for each in launches:
            blocks, threads = (f"{{{', '.join(map(str, size))}}}" for size in (each.launch.grid, each.launch.block))
            rows.append(f"{{{_quoted(each.launch.kernel)}, {first}, {len(each.given)}, {blocks}, {threads}}}")
            first += len(each.given)
        given = ", ".join(str(self._tensors[view]) for each in launches for view in each.given) or "0"
        half = int("cl_khr_fp16" in code.source)
        return [
            _table("gpu_launch", "launches", rows),
            f"static const int32_t given[] = {{{given}}};",
            "extern const char dance_gpu_code[] HIDDEN;",
            f"static const gpu_code gpu = {{dance_gpu_code, {_quoted(self.names.architecture)}, {half}, launches, "
            f"{len(launches)}, given}};",
        ]

    def _weights(self) -> list[str]:
        """The weights' table, the numbers that it points to, and the hash of the store that holds them."""
        parts, rows = [], []
        for number, stored in enumerate(self.store.tensors):
            sizes = transforms = "NULL"
            if stored.sizes:
                sizes = f"sizes_{number}"
                parts.append(f"static const int32_t {sizes}[] = {{{', '.join(map(str, stored.sizes))}}};")
            if stored.transforms:
                transforms = f"transforms_{number}"
                entries = ", ".join(value.hex() for value in stored.transforms)
                parts.append(f"static const double {transforms}[] = {{{entries}}};")
            rows.append(_weight(stored, sizes, transforms))
        digest = ", ".join(map(str, self.store.digest()))
        parts.append(f"static const unsigned char digest[] = {{{digest}}};")
        return [*parts, _table("program_weight", "weights", rows)]

    def _tensor(self, view: View) -> str:
        place = view.place
        in_arena = place.where == "IN_ARENA"
        offset = self.program.storages[place.index].offset if in_arena else 0
        output = self._outputs.get(place.index, 0) if in_arena else 0
        index = 0 if in_arena else place.index
        shape, strides = self._shapes[view.shape], self._shapes[_strides(view.shape)]
        return (
            f"{{{place.where}, {index}, {offset}, {view.bytes}u, {shape}, {strides}, {len(view.shape)}, "
            f"{_kind(view.dtype)}, {_bits(view.dtype)}, {output}}}"
        )

    def _argument(self, value: View | int | float) -> str:
        if isinstance(value, View):
            return f"{{TENSOR, {self._tensors[value]}, 0, 0}}"
        return f"{{INTEGER, 0, {value}, 0}}" if isinstance(value, int) else f"{{REAL, 0, 0, {value!r}}}"

    def _steps(self) -> list[str]:
        found, first, launch, work = [], 0, 0, 0
        for number, step in enumerate(self.program.steps):
            call = "NULL" if self.program.gpu else f"__tvm_ffi_{step.kernel}"
            free, free_bytes = self.program.free_during(number)
            launches = len(self.program.launches[number]) if self.program.gpu else 0
            place = f"{_quoted(step.kernel)}, {first}, {len(step.arguments)}, {free}u, {free_bytes}u"
            works = len(self.program.works[number]) if self.program.works else 0
            found.append(f"{{{call}, {place}, {launch}, {launches}, {work if works else -1}}}")
            first, launch, work = first + len(step.arguments), launch + launches, work + works
        return found

    def _named(self, name: str, view: View) -> str:
        shape = self._shapes[view.shape]
        return (
            f"{{{_quoted(name)}, {shape}, {len(view.shape)}, {_kind(view.dtype)}, {_bits(view.dtype)}, {view.bytes}u}}"
        )


def _weight(stored: Stored, sizes: str, transforms: str) -> str:
    numbers = f"{stored.offset}u, {stored.stored}u, {stored.source}u, {stored.bytes}u"
    return f"{{{numbers}, {stored.encoding}, {stored.preparation}, {sizes}, {transforms}}}"


def _table(kind: str, name: str, rows: list[str]) -> str:
    body = "".join(f"    {row},\n" for row in rows) or "    {0},\n"
    return f"static const {kind} {name}[] = {{\n{body}}};"


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _kind(dtype: str) -> int:
    return _KINDS[dtype.rstrip("0123456789")]


def _quoted(text: str) -> str:
    escaped = "".join(
        each
        if each.isascii() and each.isprintable() and each not in '"\\?'
        else "".join(f"\\{byte:03o}" for byte in each.encode())
        for each in text
    )
    return f'"{escaped}"'
