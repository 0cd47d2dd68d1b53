"""Trained, sparse 3D CNNs compiled to small, fast, verified artifacts.

    from dance_tvm import build_network, open_device

    built = build_network(network, "artifacts/mine", target="host", example_inputs=(clip,))
    with open_device("local") as device:
        outputs = device.load(built.artifact).run({"clip": clip.numpy()})

Names are imported when first used: ``import dance_tvm`` alone loads neither TVM nor PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dance_tvm.artifact.folder import load_artifact
    from dance_tvm.compiler.build import build_network
    from dance_tvm.compiler.pipeline import Options
    from dance_tvm.core.errors import DanceError
    from dance_tvm.device import open_device
    from dance_tvm.frontend import import_model

__all__ = ["DanceError", "Options", "build_network", "import_model", "load_artifact", "open_device"]

_HOMES = {
    "DanceError": "dance_tvm.core.errors",
    "Options": "dance_tvm.compiler.pipeline",
    "build_network": "dance_tvm.compiler.build",
    "import_model": "dance_tvm.frontend",
    "load_artifact": "dance_tvm.artifact.folder",
    "open_device": "dance_tvm.device",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
