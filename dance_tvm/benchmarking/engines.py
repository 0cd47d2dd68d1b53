"""Other engines as ours are compared with them: float32, a fixed number of threads, none spins. Loads none of ours."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


def onnxruntime_session(model: Path, threads: int) -> Any:
    """ONNX Runtime on this processor, with this many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Threads that spin between runs would take the cores of the engine whose turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def openvino_request(model: Path, threads: int) -> Any:
    """OpenVINO on this processor in float32, with this many threads."""
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    # Without the hint of precision it computes in bfloat16 where the processor can.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return core.compile_model(core.read_model(str(model)), "CPU", settings).create_infer_request()
