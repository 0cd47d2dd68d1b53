"""Trained networks as Relax modules, each checked against its source."""

from dance_tvm.frontend.importer import import_model
from dance_tvm.frontend.interface import Imported, TensorSpec

__all__ = ["Imported", "TensorSpec", "import_model"]
