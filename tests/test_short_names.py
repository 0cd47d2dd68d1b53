"""Functions whose names grew with what was fused into them fit in the names of files."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax
from tvm.script import tirx as T

from dance_tvm.transform import short_names
from dance_tvm.transform.short_names import LONGEST_NAME, ShortNames


@T.prim_func(s_tir=True)
def double(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")) -> None:
    for i in range(4):
        with T.sblock("double"):
            at = T.axis.spatial(4, i)
            y[at] = x[at] + x[at]


def calling(name: str) -> tvm.IRModule:
    """A module whose ``main`` calls one function of this name."""
    builder, kind = relax.BlockBuilder(), relax.TensorType([4], "float32")
    gvar = builder.add_func(double.without_attr("global_symbol"), name)
    x = relax.Var("x", kind)
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.call_tir(gvar, [x], kind))
        builder.emit_func_output(out)
    return builder.finalize()


def test_short_names_stay() -> None:
    mod = calling("a" * LONGEST_NAME)
    assert ShortNames()(mod).same_as(mod)
    assert LONGEST_NAME + len("_kernel_100.bin") < 255


def test_long_names_are_cut_where_they_are_defined_and_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_names, "LONGEST_NAME", 12)
    renamed = ShortNames()(calling("a_function_of_many_operators"))
    tvm.ir.assert_structural_equal(renamed, calling("a_f_92967125"))
    other = ShortNames()(calling("a_function_of_more_operators"))
    (name,) = (gvar.name_hint for gvar in renamed.get_global_vars() if gvar.name_hint != "main")
    assert len(name) == 12
    assert name.startswith("a_f_")
    assert name not in [gvar.name_hint for gvar in other.get_global_vars()], "names that begin alike stay apart"
    call = renamed["main"].body.blocks[0].bindings[0].value
    assert call.args[0].name_hint == name
    relax.analysis.well_formed(renamed)
