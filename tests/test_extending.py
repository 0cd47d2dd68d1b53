"""docs/extending.md: its Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from dance_tvm.frontend.torch_conversions import CONVERSIONS
from dance_tvm.liveness.rules import ELEMENTWISE, RULES
from dance_tvm.lowering import registry
from dance_tvm.schedules.cpu.tiles import Machine

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def test_the_page_adds_a_kernel_and_an_operator(tmp_path: Path) -> None:
    offers = registry.kernels_of(Machine(8, 16, 1, 1, True)).convolutions
    before = list(offers)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) == 6
    try:
        code = compile("\n".join(blocks), str(PAGE), "exec", dont_inherit=True)
        exec(code, {"folder": tmp_path / "built", "__name__": __name__})
    finally:
        offers[:] = before
        RULES.pop("asinh", None)
        ELEMENTWISE.discard("asinh")
        CONVERSIONS.pop("signed_log.default", None)
