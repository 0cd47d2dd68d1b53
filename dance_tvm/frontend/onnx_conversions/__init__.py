"""Operators of ONNX over Relax: where TVM's importer lacks them, emits loops, or departs from the standard.

A module for each kind of operator, each with its own table ``CONVERSIONS``.
"""

from __future__ import annotations

from dance_tvm.frontend.onnx_conversions import (
    convolutions,
    elementwise,
    indexing,
    norms,
    pools,
    products,
    quantized,
    recurrent,
    reductions,
    resampling,
    shapes,
)
from dance_tvm.frontend.onnx_conversions.operator import Conversion

#: Operators that are taken apart as the standard defines them, though TVM's importer has something by that name.
BY_DEFINITION = frozenset({"Attention", "AffineGrid", "MeanVarianceNormalization", "GroupNormalization"})

#: How an operator is converted, by its name.
CONVERSIONS: dict[str, Conversion] = {
    **shapes.CONVERSIONS,
    **indexing.CONVERSIONS,
    **elementwise.CONVERSIONS,
    **products.CONVERSIONS,
    **reductions.CONVERSIONS,
    **convolutions.CONVERSIONS,
    **pools.CONVERSIONS,
    **norms.CONVERSIONS,
    **quantized.CONVERSIONS,
    **recurrent.CONVERSIONS,
    **resampling.CONVERSIONS,
}
