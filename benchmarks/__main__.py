"""The short form of the benchmarks that need no training: `make bench`."""

from __future__ import annotations

import subprocess
import sys

SHORT = [
    ["benchmarks.roofline", "--quick"],
    ["benchmarks.efficiency", "--quick"],
    ["benchmarks.peers", "--quick"],
]


def main() -> int:
    """Run each in a process of its own, so that none inherits another's threads; the first failure ends it."""
    for name, *options in SHORT:
        print(f"\n{name}", flush=True)
        code = subprocess.run([sys.executable, "-m", name, *options], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
