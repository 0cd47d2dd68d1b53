"""Layers exported for a GPU machine without TVM: right on OpenCL by the script that goes with them, PTX as asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("benchmarks.gpu_export", reason="benchmarks are not part of an installed package")

from benchmarks import gpu_export
from benchmarks.kernels import Layer
from dance_tvm.machines.gpu import detect_opencl, opencl_library
from dance_tvm.machines.target import load_target

TINY = Layer("tiny", 8, 32, (3, 6, 6))


@pytest.mark.skipif(detect_opencl() is None, reason="no OpenCL device: dance-tvm doctor")
def test_exported_layers_are_right_without_dance_tvm_on_the_path(tmp_path):
    layers = [gpu_export.Exported(TINY, *thinned) for thinned in (("channels",), ("", 16))]
    gpu_export.export(tmp_path, load_target("opencl"), layers)
    library = Path(str(opencl_library()))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"DANCE_GPU_DRIVER": str(library), "PYOPENCL_HOME": str(library.parent.parent)}
    environment |= {"LD_LIBRARY_PATH": str(library.parent)}
    command = [sys.executable, "gpu_layers.py", "--rounds", "1", "--json", "found.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["layers"]
    assert [(row["name"], row["equal"]) for row in rows] == [
        ("tiny, channels", True),
        ("tiny, groups of 16 filters", True),
    ]
    kernels = zipfile.ZipFile(tmp_path / rows[1]["file"]).read("manifest.json").decode()
    assert "conv3d_kgs_gpu" in kernels


@pytest.mark.skipif(find_spec("nvidia") is None, reason="no CUDA compiler: pip install 'dance-tvm[gpu]'")
def test_a_layer_is_exported_as_ptx_of_the_asked_architecture(tmp_path):
    """One on which TVM's RewriteDataflowReshape fails."""
    wide = gpu_export.Exported(Layer("wide", 512, 512, (4, 14, 14)))
    written = gpu_export.export(tmp_path, gpu_export.target_of("sm_80"), [wide])
    assert b".target sm_80" in zipfile.ZipFile(tmp_path / "wide.zip").read("model.so")
    assert written < 5_000_000
