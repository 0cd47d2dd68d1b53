"""What the package itself offers, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dance_tvm


def test_the_package_offers_its_six_names():
    assert {name for name in dance_tvm.__all__ if getattr(dance_tvm, name)} == {
        "DanceError",
        "Options",
        "build_network",
        "import_model",
        "load_artifact",
        "open_device",
    }
    assert set(dance_tvm.__all__) <= set(dir(dance_tvm))


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'relay'"):
        _ = dance_tvm.relay


def test_importing_the_package_loads_neither_tvm_nor_torch():
    code = "import sys, dance_tvm; dance_tvm.DanceError; print(sorted({'tvm', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
