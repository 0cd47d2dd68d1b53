"""Turn exp and similar functions into vector code in every function of a module for a CPU."""

from __future__ import annotations

import tvm
from tvm import tirx

from dance_tvm.schedules.elementary import written_out


@tvm.transform.module_pass(opt_level=0, name="VectorMath")
class VectorMath:
    """Write out the elementary functions of every PrimFunc, of our kernels and of TVM's."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite each PrimFunc that has any."""
        functions = {
            name: written_out(func) if isinstance(func, tirx.PrimFunc) else func for name, func in mod.functions_items()
        }
        return tvm.IRModule(functions, attrs=mod.attrs)
