"""Predicted cycles of blocks counted in emulation: what is joined, what is weighed, what counts as the average."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest

from benchmarks import arm_cycles
from benchmarks.arm_cycles import Block, Tools, joined, one_call, predict
from dance_tvm.core.errors import DanceError

#: fmla v0.4s, v1.4s, v2.s[0], whose sum the next one waits for; nop; b.ne back to the first.
CHAINED, NOP, BACK = (word.to_bytes(4, "little") for word in (0x4F821020, 0xD503201F, 0x54FFFFC1))


def test_blocks_that_touch_and_are_executed_equally_often_are_one() -> None:
    counts = {Block(8, CHAINED): 5, Block(0, NOP + NOP): 5, Block(12, BACK): 7, Block(100, NOP): 7, Block(200, NOP): 2}
    assert joined(counts) == Counter({NOP + NOP + CHAINED: 5, BACK: 7, NOP: 9})


def test_one_call_is_what_two_have_more_and_runs_at_other_addresses_are_refused() -> None:
    start, loop = Block(0, NOP), Block(4, CHAINED + BACK)
    assert one_call(Counter({start: 3, loop: 9000}), Counter({start: 2, loop: 18000})) == {loop: 9000}
    with pytest.raises(DanceError, match="cannot be compared"):
        one_call(Counter({loop: 9000}), Counter({Block(8, loop.code): 18000}))


def test_cycles_are_weighed_by_executions_and_the_rarest_code_counts_as_the_average(monkeypatch) -> None:
    monkeypatch.setattr(arm_cycles, "disassembled", lambda codes, mc: ["" for _ in codes])
    monkeypatch.setattr(arm_cycles, "_cycles", lambda regions, model, tools: [4.0, 0.5][: regions.count("BEGIN")])
    found = predict({Block(0, CHAINED + BACK): 600, Block(100, NOP): 798, Block(200, NOP + BACK): 1}, Tools())
    assert found.instructions == 2000
    assert set(found.cycles.values()) == {(600 * 4 + 798 * 0.5) * 2000 / 1998}


@pytest.mark.skipif(not (shutil.which("llvm-mca-19") and shutil.which("llvm-mc-19")), reason="needs LLVM 19's tools")
def test_a_sum_that_waits_for_itself_takes_a_latency_each_time_and_nothing_else_does() -> None:
    """Multiply-adds into one register take two cycles or more each on X1 and X2, into others a quarter."""
    others = b"".join((0x4F821020 + index).to_bytes(4, "little") for index in range(3, 27))
    chained, independent = (predict({Block(0, code): 1000}, Tools()).cycles for code in (24 * CHAINED, others))
    for model in ("neoverse-v1", "neoverse-v2"):
        assert chained[model] >= 48_000
        assert independent[model] == pytest.approx(6_000, rel=0.05)
    with pytest.raises(DanceError, match="does not know an instruction"):
        predict({Block(0, b"\xff\xff\xff\xff"): 1}, Tools())
