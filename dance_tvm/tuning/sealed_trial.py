"""A trial for `dance_server`, which runs only sealed artifacts: an artifact of its own, without inputs.

Its ``main`` fills the tensors, plans the lists, runs the kernel and sums its result, so that only code and lists
travel to the device, as with TVM's servers; the kernel's time is that of its step.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tvm
from tvm import relax

from dance_tvm.artifact.folder import Check, Manifest, Tensor, load_artifact
from dance_tvm.compiler.code import compile_lowered
from dance_tvm.compiler.pipeline import Options
from dance_tvm.compiler.program import built_for, write_program
from dance_tvm.core.versions import versions
from dance_tvm.device.served import ServedNetwork, ServedSession
from dance_tvm.lowering.lowered import Lowered
from dance_tvm.schedules.kernel import Kernel, Operand
from dance_tvm.tuning.instances import DIGEST, KERNEL, PARTS, Instance, enough

if TYPE_CHECKING:
    from dance_tvm.machines.target import Target

SUMS = "sums"


def build_sealed(instance: Instance, target: Target, path: Path) -> None:
    """Write the artifact of ``instance`` for ``target`` to the folder ``path``."""
    target, options = target.storing(instance.dtype), Options(threads=instance.workload.threads, cache=False)
    manifest = Manifest(
        name="trial",
        source_sha256="",
        inputs=[],
        outputs=[Tensor(name=SUMS, shape=[PARTS], dtype="int64", meaning="digest")],
        target=built_for(target, options.threads),
        versions=versions(),
        memory_peak_bytes=0,
        check=Check(status="not run", reason="a trial"),
    )
    lowered = Lowered(_main(instance))
    with tempfile.TemporaryDirectory(prefix="dance_tvm_trial_") as folder:
        code = compile_lowered(lowered, target, options, Path(folder))
        write_program(path, lowered, code, manifest, target, options)


def _main(instance: Instance) -> tvm.IRModule:
    """The functions of a trial's library, and ``main`` that calls them in turn."""
    builder = relax.BlockBuilder()
    functions = {str(var.name_hint): func for var, func in instance.module().functions_items()}
    with builder.function("main", []):
        with builder.dataflow():
            sums = builder.emit_output(_Calls(builder, functions, instance).sums())
        builder.emit_func_output(sums)
    return builder.get()


class _Calls:
    """Calls of a trial's functions in a function under construction."""

    def __init__(self, builder: relax.BlockBuilder, functions: dict[str, Any], instance: Instance) -> None:
        self.builder, self.functions, self.instance = builder, functions, instance
        self.masks = {axis: relax.const(mask) for axis, mask in instance.masks().items()}
        self.lists: dict[str, relax.Expr] = {}

    def sums(self) -> relax.Expr:
        """The digest of the kernel's result."""
        instance = self.instance
        self.x = self._call("fill_x", [], [(instance.x_shape, instance.dtype)])[0]
        for index, each in enumerate(instance.kernel.lists()):
            types = [(operand.shape, operand.dtype) for operand in each.planner.outputs()]
            made = self._call(f"plan{index}", self._given(each.planner), types)
            self.lists.update(zip(each.names, made, strict=True))
        y = self._in_place(KERNEL, [*self._given(instance.kernel), self._filled()], (instance.y_shape, instance.dtype))
        return self._call(DIGEST, [y], [((PARTS,), "int64")])[0]

    def _given(self, kernel: Kernel) -> list[relax.Expr]:
        """What a planner or the kernel reads, in its order."""
        constants = {name: relax.const(each) for name, each in kernel.prepare(self.instance.weights).items()}

        def tensor(operand: Operand) -> relax.Expr:
            if operand.role == "residual":
                return self._filled()
            if operand.role == "constant" and operand.name not in constants:
                return self._call("fill_weights", [], [(operand.shape, operand.dtype)])[0]
            if operand.role == "data":
                return self.x
            return self.masks[operand.axis] if operand.role == "mask" else {**constants, **self.lists}[operand.name]

        return [tensor(operand) for operand in kernel.inputs()]

    def _filled(self) -> relax.Expr:
        return self._call("fill_y", [], [(self.instance.y_shape, self.instance.dtype)])[0]

    def _function(self, name: str) -> Any:
        return self.builder.add_func(self.functions[name].without_attr("global_symbol"), name)

    def _call(self, name: str, given: list[relax.Expr], types: list[tuple[tuple[int, ...], str]]) -> list[relax.Expr]:
        made = [relax.TensorType(list(shape), dtype) for shape, dtype in types]
        call = relax.call_tir(self._function(name), given, made[0] if len(made) == 1 else made)
        result = self.builder.emit(call)
        if len(made) == 1:
            return [result]
        return [self.builder.emit(relax.TupleGetItem(result, index)) for index in range(len(made))]

    def _in_place(self, name: str, given: list[relax.Expr], kind: tuple[tuple[int, ...], str]) -> relax.Expr:
        """A call that writes into its last argument: what it leaves out there stays as it is."""
        made = relax.TensorType(list(kind[0]), kind[1])
        return self.builder.emit(relax.op.call_tir_inplace(self._function(name), given, [len(given) - 1], made))


@dataclass(frozen=True)
class SealedTrial:
    """A trial's artifact on a device."""

    instance: Instance
    network: ServedNetwork
    origin: str
    step: int
    unit: Literal["seconds"] = "seconds"

    @staticmethod
    def on(session: ServedSession, instance: Instance, path: Path) -> SealedTrial:
        """Bring the artifact at ``path`` onto the session's device."""
        network = session.load(load_artifact(path))
        assert isinstance(network, ServedNetwork)
        return SealedTrial(instance, network, session.name, network.step_names().index(KERNEL))

    def digest(self) -> int | None:
        """As :meth:`.instances.Loaded.digest`."""
        return int(self.network.run({})[SUMS].sum()) if self.instance.exact else None

    def times(self, repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` runs of the kernel, after one that warms up."""
        return [float(each) for each in self.network.step_seconds({}, 1 + repeats)[1:, self.step]]

    def measure(self, best: float | None = None) -> list[float]:
        """As :meth:`.instances.Loaded.measure`."""
        return enough(self.times, best)
