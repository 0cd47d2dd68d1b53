"""Run an artifact on the arrays of an .npz file, in Python with numpy alone: no TVM, no PyTorch.

    cp dance_tvm/artifact/interface/dance_model.py examples/
    python examples/python_ctypes.py ARTIFACT INPUT.npz OUTPUT.npz [THREADS]

INPUT.npz holds one array for each input, under its name; OUTPUT.npz gets the outputs under theirs. `dance_model.py` is
the C interface (`dance_model.h`) by ctypes in one file, to be copied beside the program that uses it.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from dance_model import Model, ModelError


def main(artifact: str, given: str, answers: str, threads: str = "0") -> None:
    """Run ``artifact`` once on ``given`` and write ``answers``; raises ModelError, ValueError or OSError."""
    with np.load(given, allow_pickle=False) as file:
        inputs = dict(file)
    with Model(artifact, threads=int(threads)) as model:
        start = time.perf_counter()
        outputs = model.run(inputs)
        spent = time.perf_counter() - start
        np.savez(answers, **outputs)
        print(f"{model.describe()}: {1e3 * spent:.3f} ms, {model.memory() / 1e6:.1f} MB")


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 5:
        sys.exit("error: python_ctypes.py ARTIFACT INPUT.npz OUTPUT.npz [THREADS]")
    try:
        main(*sys.argv[1:])
    except (ModelError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
