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


def _list_composite_operators_once() -> None:
    """PyTorch's exporter lists its operators in every export, a tenth of a small program's time."""
    import torch.export.decomp_utils
    import torch.export.exported_program

    listed = functools.cache(torch.export.decomp_utils._collect_all_valid_cia_ops)
    for module in (torch.export.decomp_utils, torch.export.exported_program):
        module._collect_all_valid_cia_ops = listed  # type: ignore[attr-defined]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to standard output
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.setrecursionlimit(5000)
    import torch

    _list_composite_operators_once()
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
