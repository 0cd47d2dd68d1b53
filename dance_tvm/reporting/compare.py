"""Two results side by side: ratios with their intervals, and what makes them hard to compare."""

from __future__ import annotations

import shlex
from typing import Any

from dance_tvm.benchmarking.results import Device, Measured, Results, Verdict
from dance_tvm.benchmarking.statistics import judge, unpaired_ratio
from dance_tvm.core.errors import DanceError
from dance_tvm.core.printing import duration, plain_number
from dance_tvm.reporting.charts import Chart
from dance_tvm.reporting.page import Page, title_of
from dance_tvm.reporting.papers import name_of
from dance_tvm.reporting.svg import Bar, Row, from_zero, rows
from dance_tvm.reporting.tables import Table

THRESHOLD = 0.05
Both = tuple[Device, Measured, Measured]


def comparison(first: Results, second: Results, names: tuple[str, str]) -> Page:
    """A page of what both measured. Raises DanceError where they share no network on any device."""
    shared = _shared(first, second)
    if not shared:
        raise DanceError(f"{names[0]} and {names[1]} measured no network of one name and role on the same device")
    found = [(device, old, new, verdict_of(device, old, new)) for device, old, new in shared]
    return Page(
        title=f"{names[1]} beside {names[0]}",
        subtitle=f"A: {names[0]}, {first.created}, {title_of(first)}. B: {names[1]}, {second.created}, "
        f"{title_of(second)}. Measured at different times: what else the machine did is in the ratios.",
        tiles=[
            (f"{each.ratio:.2f}×", f"of A's time, {new.name}: {_said(old, new, each)}") for _, old, new, each in found
        ],
        verdicts=[],
        warnings=[text for device, old, new in shared for text in differences(device, old, new)],
        tables=[_summary(found), *(_layers(*each) for each in shared if each[1].profile and each[2].profile)],
        charts=[_chart(shared)],
        pictures=[],
        command=shlex.join(["dance-tvm", "report", *names]),
    )


def facts(first: Results, second: Results) -> dict[str, Any]:
    """The same for programs."""
    return {
        "compared": [
            {**verdict_of(device, old, new).model_dump(), "name": new.name, "role": new.role, "a_p50": old.latency.p50,
             "b_p50": new.latency.p50, "differs": differences(device, old, new)}
            for device, old, new in _shared(first, second)
        ]
    }  # fmt: skip


def verdict_of(device: Device, old: Measured, new: Measured) -> Verdict:
    """B's time over A's, with its 95% interval."""
    ratio = unpaired_ratio(new.latency.seconds, old.latency.seconds)
    return judge(device.spec, new.artifact, ratio, THRESHOLD, interleaved=False)


def _said(old: Measured, new: Measured, verdict: Verdict) -> str:
    """What B is: neither faster nor slower where it is the same code, whatever the machine did."""
    return "the same code" if old.library_sha256 == new.library_sha256 else verdict.verdict


def differences(device: Device, old: Measured, new: Measured) -> list[str]:
    """What differs beside the code, one sentence each."""
    asked = [
        ("target", old.target, new.target),
        ("number of threads", old.threads, new.threads),
        ("input", old.input_sha256[:12], new.input_sha256[:12]),
    ]
    found = [
        f"{new.name} on {name_of(device)}: the {what} was {then or 'not given'} in A and is {now or 'not given'} in B"
        for what, then, now in asked
        if then != now
    ]
    if old.library_sha256 == new.library_sha256:
        found.append(f"{new.name}: the library is identical, so its ratio reflects only the machine")
    return found


def _shared(first: Results, second: Results) -> list[Both]:
    known = {(device.spec, item.name, item.role): item for device in first.devices for item in device.measured}
    return [
        (device, known[key], item)
        for device in second.devices
        for item in device.measured
        if (key := (device.spec, item.name, item.role)) in known
    ]


def _summary(found: list[tuple[Device, Measured, Measured, Verdict]]) -> Table:
    cells = [
        [new.title, name_of(device), _said(old, new, each), _ms(old.latency.p50),
         _ms(new.latency.p50), f"{each.ratio:.3f}", f"{each.low:.3f} to {each.high:.3f}",
         f"{old.latency.spread:.1%}", f"{new.latency.spread:.1%}"]
        for device, old, new, each in found
    ]  # fmt: skip
    heads = ["network", "device", "B is", "A, ms", "B, ms", "B ÷ A", "95% interval", "spread of A", "of B"]
    text = f"Slower and faster are said only where the whole interval lies beyond {THRESHOLD:.0%}."
    return Table("Side by side", text, heads, cells, words=3)


def _layers(device: Device, old: Measured, new: Measured) -> Table:
    assert old.profile is not None
    assert new.profile is not None
    before = {layer.name: layer for layer in old.profile.layers}
    cells = []
    for layer in new.profile.layers:
        then = before.get(layer.name)
        ratio = f"{layer.seconds / then.seconds:.3f}" if then and then.seconds else "–"
        kernels = layer.kernel if then is None or then.kernel == layer.kernel else f"{then.kernel} → {layer.kernel}"
        cells.append([layer.name, kernels, _ms(then.seconds) if then else "–", _ms(layer.seconds), ratio])
    text = f"On {name_of(device)}; medians of a few runs, without an interval."
    heads = ["layer", "kernel", "A, ms", "B, ms", "B ÷ A"]
    return Table(f"Layers of {new.title}", text, heads, cells, words=2)


def _chart(shared: list[Both]) -> Chart:
    shown = []
    for device, old, new in shared:
        bars = []
        for colour, (name, item) in enumerate((("A", old), ("B", new))):
            runs = sorted(item.latency.seconds)
            box = (1e3 * runs[len(runs) // 20], 1e3 * runs[-1 - len(runs) // 20])
            text = duration(item.latency.p50)
            bars.append(Bar(1e3 * item.latency.p50, colour, f"median {text}", f"{name}: {text}", box))
        shown.append(Row(f"{new.title} on {name_of(device)}", bars))
    scale = from_zero("milliseconds per run", [bar.box[1] for row in shown for bar in row.bars if bar.box])
    cells = [[row.label, *(plain_number(bar.value) for bar in row.bars)] for row in shown]
    table = Table("Latency", "", ["network", "A, median ms", "B, median ms"], cells)
    drawing = rows(scale, shown, [("A", 0), ("B", 1)], "Median latency in A and in B")
    return Chart("Latency", "Bars are medians; nine in ten runs lie within the whisker.", drawing, table)


def _ms(seconds: float) -> str:
    return plain_number(1e3 * seconds)
