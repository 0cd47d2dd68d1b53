"""What the C interface counts while it profiles, beside what the same call's tensors tell Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dance_tvm.artifact.folder import Artifact
from dance_tvm.artifact.interface.dance_model import Model
from dance_tvm.artifact.layers import layers_called
from dance_tvm.device import serve
from dance_tvm.device.session import kernel_table
from dance_tvm.machines.gpu import opencl_library


def counted_alike(artifact: Artifact, inputs: Mapping[str, np.ndarray], which: int | None = None) -> dict[str, int]:
    """What each kernel of a call executed, by symbol, which Python and C have counted alike.

    ``which``: of two kernels in one, the one that runs.
    """
    table, manifest = kernel_table(artifact.manifest), artifact.manifest
    called: list[tuple[str, dict[str, Any] | None]] = []

    def seen(symbol: str, tensors: list[np.ndarray]) -> None:
        kernel = table.get(symbol)
        if which is not None and manifest.kernels[symbol].is_free_choice:
            tensors[0][:] = which
        told = serve.looked_at(kernel, [serve.Seen.of(each) for each in tensors])
        called.append((symbol, told.get("work")))

    driver = opencl_library() if manifest.target.tvm.get("kind") == "opencl" else None
    with Model(artifact.path, driver=driver) as model:
        model.run(inputs)
        assert set(model.work()) <= {0, None}, "nothing is counted where nobody asked for it"
        model.profile()
        model.watch(inputs, seen)
        once = model.work()
        model.run(inputs)
        if which is None:
            assert model.work() == [macs and 2 * macs for macs in once]
    layers = layers_called(manifest.layers, manifest.kernels, [symbol for symbol, _ in called])
    expected = []
    for (_, work), layer in zip(called, layers, strict=True):
        if work is not None and work["macs"] is None:
            assert layer is not None
            expected.append(round(work["share"] * layer.macs))
        else:
            expected.append(work and work["macs"])
    assert once == expected
    assert any(macs is not None for macs in expected)
    return {symbol: macs for (symbol, _), macs in zip(called, once, strict=True) if macs is not None}
