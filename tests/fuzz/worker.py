"""A child process that tries programs, one JSON line each way; what crashes ends it alone."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import logging
import os
import resource
import sys
import time
import warnings


def _spare_the_exporter() -> None:
    """PyTorch's exporter lists and overrides its operators anew in every export, a fifth of a small program's time."""
    import torch.export.decomp_utils
    import torch.export.exported_program
    from torch._ops import OperatorBase

    whole = OperatorBase.py_impl

    def py_impl(self, key):
        """As PyTorch's own, for a plain key without the annotations that are made in each call."""
        if not isinstance(key, torch._C.DispatchKey):
            return whole(self, key)

        def register(function):
            self.py_kernels[key] = function
            self._dispatch_cache.clear()
            return function

        return register

    OperatorBase.py_impl = py_impl  # for speed, as said above
    listed = functools.cache(torch.export.decomp_utils._collect_all_valid_cia_ops)
    for module in (torch.export.decomp_utils, torch.export.exported_program):
        module._collect_all_valid_cia_ops = listed  # the same


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to standard output
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.setrecursionlimit(5000)
    import torch

    _spare_the_exporter()
    from .memory import Guard
    from .program import Program
    from .trial import try_program

    torch.set_num_threads(1)
    guard = Guard()
    for line in sys.stdin:
        program = Program.from_json(line)
        started = time.process_time()
        verdict = try_program(program, guard)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        told = {**verdict.to_dict(), "seconds": round(time.process_time() - started, 2), "resident_mib": resident}
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
