"""Charts of a benchmark's results, each with the table of what it shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dance_tvm.benchmarking.results import Device, Layer, Measured, Pair, Results
from dance_tvm.core.errors import DanceError
from dance_tvm.core.printing import duration, plain_number
from dance_tvm.reporting.papers import name_of
from dance_tvm.reporting.svg import COLOURS, Axis, Bar, Point, Row, Series, from_zero, plot, rows
from dance_tvm.reporting.tables import Link, Table

#: Colour classes of the page, by what an artifact is.
ROLES = {"sparse": 0, "dense": 1, "other": 2}
DIAGONAL = 7
MOST_LAYERS = 30
MOST_CURVES = 12


@dataclass(frozen=True)
class Chart:
    """A heading, a sentence, the drawing, and the same as a table."""

    heading: str
    text: str
    drawing: str
    table: Table


def overview(results: Results) -> Chart:
    """The median of each artifact's runs on each device, with the spread of most of them."""
    shown, cells = [], []
    for device in results.devices:
        for item in device.measured:
            runs, name = item.latency, label(item, device, results)
            most = sorted(runs.seconds)[len(runs.seconds) // 20 : -(len(runs.seconds) // 20) or None]
            box = (1e3 * most[0], 1e3 * most[-1])
            text = duration(runs.p50)
            tip = f"{name}: {text}, most runs {duration(most[0])} to {duration(most[-1])}"
            shown.append(Row(name, [Bar(1e3 * runs.p50, ROLES[item.role], f"median {text}", tip, box)]))
            cells.append(
                [name, *(plain_number(value) for value in (1e3 * runs.fastest, box[0], 1e3 * runs.p50, box[1]))]
            )
    scale = from_zero("milliseconds per run", [bar.box[1] for row in shown for bar in row.bars if bar.box])
    table = Table("Latency", "", ["network", "fastest ms", "5th percentile", "median", "95th percentile"], cells)
    about = "Median latency of each network, with the range of most runs"
    text = "Bars are medians; nine in ten runs lie within the whisker."
    return Chart("Latency", text, rows(scale, shown, _legend(results), about), table)


def by_clip(device: Device) -> Chart | None:
    """Latency of each clip, dense beside sparse, clips with the least work left first."""
    order: list[str] = []
    series, found = [], {}
    for item in sorted(device.measured, key=lambda item: item.role != "sparse"):
        clips = {clip.name: clip for clip in item.clips}
        order = order or [clip.name for clip in sorted(item.clips, key=lambda clip: (clip.kept or 0, clip.p50))]
        points = [
            Point(place, 1e3 * clips[name].p50, f"{name}: {duration(clips[name].p50)}", 1e3 * clips[name].p90)
            for place, name in enumerate(order, 1)
            if name in clips
        ]
        if points:
            series.append(Series(item.title, ROLES[item.role], points))
            found[series[-1].name] = clips
    if not order:
        return None
    x = Axis("clip, the one with the least work first", 0.5, len(order) + 0.5)
    y = from_zero("ms, whisker to the 90th percentile", [point.high or 0 for each in series for point in each.points])
    cells = [
        [name, *(plain_number(1e3 * clips[name].p50) if name in clips else "–" for clips in found.values())]
        for name in order
    ]
    table = Table("Latency by clip", "", ["clip", *(f"{name}, ms" for name in found)], cells)
    text = "Clips are ordered by how much of their work was left to do."
    return Chart("Latency by clip", text, plot(x, y, series, "Latency of each clip"), table)


def kept_against_latency(device: Device) -> Chart | None:
    """Every clip of a dynamic network: multiply-accumulates left against latency."""
    series, cells = [], []
    for item in device.measured:
        if item.correlation is None:
            continue
        known = [clip for clip in item.clips if clip.kept is not None]
        points = [Point(100 * (clip.kept or 0), 1e3 * clip.p50, clip.name) for clip in known]
        series.append(Series(f"{item.name}, correlation {item.correlation:.2f}", ROLES[item.role], points))
        cells += [[f"{point.tip}, {item.name}", f"{point.x:.1f}", plain_number(point.y)] for point in points]
    if not series:
        return None
    every = [point for each in series for point in each.points]
    x = from_zero("% of the dense multiply-accumulates executed", [point.x for point in every])
    y = from_zero("ms", [point.y for point in every])
    table = Table("Work left and time", "", ["clip", "% executed", "ms"], cells)
    return Chart("Work left and time", "One point a clip.", plot(x, y, series, "Work left against latency"), table)


def by_layer(device: Device, results: Results) -> Chart | None:
    """Where the time goes: one row per layer, one bar per artifact; links lead to why each kernel was chosen."""
    profiled = [item for item in device.measured if item.profile]
    if not profiled:
        return None
    seconds: dict[str, dict[int, Layer]] = {}
    for index, item in enumerate(profiled):
        for layer in item.profile.layers if item.profile else ():
            seconds.setdefault(layer.name, {})[index] = layer
    heaviest = sorted(seconds, key=lambda name: -max(layer.seconds for layer in seconds[name].values()))[:MOST_LAYERS]
    shown, cells = [], []
    for name, layers in seconds.items():
        bars = [
            Bar(1e3 * layer.seconds, ROLES[profiled[index].role], duration(layer.seconds), describe(layer))
            for index, layer in layers.items()
        ]
        first = next(iter(layers))
        place = place_of(device, profiled[first], name) if layers[first].why or layers[first].tuned else ""
        if name in heaviest:
            shown.append(Row(name, bars, place))
        times = (
            plain_number(1e3 * layers[index].seconds) if index in layers else "–" for index in range(len(profiled))
        )
        cells.append([Link(name, place) if place else name, *times])
    names = [label(item, device, results) for item in profiled]
    scale = from_zero("milliseconds", [bar.value for row in shown for bar in row.bars])
    table = Table("Where the time goes", "", ["layer", *(f"{name}, ms" for name in names)], cells)
    left = len(seconds) - len(shown)
    text = "One row per layer, in order." + (f" The other {left}, which take less, are in the table." if left else "")
    legend = [(name, ROLES[item.role]) for name, item in zip(names, profiled, strict=True)]
    return Chart("Where the time goes", text, rows(scale, shown, legend, "Time of each layer"), table)


def efficiency(results: Results) -> Chart | None:
    """Work saved against time saved, by layer and for the whole; on the diagonal all of the saving became speed."""
    series, cells = [], []
    for pair in results.pairs:
        sparse, dense = _pair_of(pair, results)
        if not (sparse.profile and dense.profile):
            continue
        whole = {layer.name: layer for layer in worked(dense)}  # a controller's layers have no dense twin
        points = [
            Point(theirs.executed_macs / ours.executed_macs, theirs.seconds / ours.seconds, ours.name)
            for ours in worked(sparse)
            if (theirs := whole.get(ours.name)) and ours.executed_macs and ours.seconds
        ]
        series.append(Series(f"layers of {sparse.name} on {pair.device}", ROLES["sparse"], points))
        if pair.mac_reduction:
            point = Point(pair.mac_reduction, pair.speed_up, f"whole of {sparse.name}", pair.high, pair.low)
            series.append(Series(f"whole of {sparse.name}", ROLES["dense"], [point]))
        cells += [[each.tip, f"{each.x:.3f}", f"{each.y:.3f}"] for one in series[-2:] for each in one.points]
    every = [point for each in series for point in each.points]
    if not every:
        return None
    x = from_zero("fold fewer multiply-accumulates", [1.0, *(point.x for point in every)])
    y = from_zero("fold faster", [1.0, *(point.high or point.y for point in every)])
    end = min(x.high, y.high)
    series.append(Series("all of the saving became speed", DIAGONAL, [Point(0, 0), Point(end, end)], "dotted"))
    heading = "Work saved and time saved"
    table = Table(heading, "", ["layer", "fold fewer multiply-accumulates", "fold faster"], cells)
    return Chart(heading, "On the dotted line, all of the saved work became speed.", plot(x, y, series, heading), table)


def tuning(path: Path) -> Chart:
    """The best time found so far, by trial, for each workload of a tuning log. Raises DanceError for another file."""
    best: dict[str, list[float]] = {}
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            record = _record(line)
            if record is not None:
                curve = best.setdefault(record["workload_id"], [])
                curve.append(min([record["seconds"], *curve[-1:]]))
    except OSError as error:
        raise DanceError(f"tuning log {path} cannot be read ({error.strerror}): check the path") from None
    if not best:
        raise DanceError(f"{path} holds no trial of dance-tvm tune")
    return curves(f"Tuning: {path.name}", {name[:8]: [curve[0] / it for it in curve] for name, curve in best.items()})


def curves(heading: str, gains: dict[str, list[float]]) -> Chart:
    """How many times faster than its first trial the best so far was, by trial, of the workloads tried most often."""
    longest = sorted(gains.items(), key=lambda item: -len(item[1]))[:MOST_CURVES]
    series = [
        Series(name, index % COLOURS, [Point(trial, gain) for trial, gain in enumerate(curve, 1)], "stairs")
        for index, (name, curve) in enumerate(longest)
    ]
    x = Axis("trial", 1, max(2, *(len(curve) for _, curve in longest)))
    y = from_zero("fold faster than the first trial", [curve[-1] for _, curve in longest])
    cells = [[name, str(len(curve)), f"{curve[-1]:.3f}"] for name, curve in gains.items()]
    table = Table(heading, "", ["workload", "trials", "fold faster than the first"], cells)
    return Chart(heading, "The best found so far, by trial.", plot(x, y, series, heading), table)


def label(item: Measured, device: Device, results: Results) -> str:
    """A short name; the device is named where there are several."""
    return f"{item.title} on {name_of(device)}" if len(results.devices) > 1 else item.title


def place_of(device: Device, item: Measured, layer: str) -> str:
    """The name of the page's row that says why a layer has its kernel."""
    return f"why {device.spec} {item.artifact} {layer}".replace(" ", "-")


def describe(layer: Layer) -> str:
    """A layer's figures for a hovering reader."""
    words = [layer.name, layer.kernel, duration(layer.seconds)]
    if layer.macs:
        words.append(f"{layer.executed_macs / 1e6:.1f} of {layer.macs / 1e6:.1f} MMACs, {layer.gflops:.1f} GFLOP/s")
    kept = {"frames": layer.kept_frames, "positions": layer.kept_positions, "channels in": layer.kept_channels_in,
            "channels out": layer.kept_channels_out}  # fmt: skip
    words += [f"{share:.0%} of {what}" for what, share in kept.items() if share is not None]
    return "\n".join(word for word in words if word)


def worked(item: Measured) -> list[Layer]:
    """The layers that multiply, in order."""
    return [layer for layer in item.profile.layers if layer.macs] if item.profile else []


def all_charts(results: Results, tuning_logs: Sequence[Path]) -> list[Chart]:
    """Everything that there is data for."""
    charts = [overview(results)]
    for device in results.devices:
        where = f" on {name_of(device)}" if len(results.devices) > 1 else ""
        for chart in (by_layer(device, results), by_clip(device), kept_against_latency(device)):
            if chart is not None:
                charts.append(Chart(f"{chart.heading}{where}", chart.text, chart.drawing, chart.table))
    saved = efficiency(results)
    return charts + ([saved] if saved else []) + [tuning(path) for path in tuning_logs]


def _legend(results: Results) -> list[tuple[str, int]]:
    roles = dict.fromkeys(item.role for device in results.devices for item in device.measured)
    return [(role, ROLES[role]) for role in roles] if len(roles) > 1 else []


def _pair_of(pair: Pair, results: Results) -> tuple[Measured, Measured]:
    known = [item for device in results.devices if device.spec == pair.device for item in device.measured]
    return _named(known, pair.sparse), _named(known, pair.dense)


def _named(known: Iterable[Measured], artifact: str) -> Measured:
    return next(item for item in known if item.artifact == artifact)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(record, dict) and record.get("status") == "trial" and record.get("seconds", 0) > 0
    return record if fits and isinstance(record.get("workload_id"), str) else None
