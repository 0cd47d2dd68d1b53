"""``python -m dance_tvm``: the same as ``dance-tvm``."""

from dance_tvm.core.cli import main

if __name__ == "__main__":
    main()
