"""Charts of a benchmark's results, as Plotly figures without a background, so that the page's own shows through."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from dance_tvm.benchmarking.results import Device, Layer, Measured, Pair, Results
from dance_tvm.core.errors import DanceError
from dance_tvm.reporting.papers import name_of

# Colours that are told apart in both themes and by colour-blind readers (Okabe and Ito).
ROLE_COLOURS = {"sparse": "#0072B2", "dense": "#E69F00", "other": "#009E73"}
LAYER_COLOURS = ["#0072B2", "#56B4E9", "#009E73", "#8CC63F", "#E69F00", "#D55E00", "#CC79A7", "#7B61B8"]
REST_COLOUR = "#9AA0A6"
MOST_POINTS = 2000


def overview(results: Results) -> go.Figure:
    """Spread of the runs of each artifact on each device, as boxes."""
    figure = go.Figure()
    for device in results.devices:
        for item in device.measured:
            seconds = item.latency.seconds
            shown = np.asarray(seconds[:: max(1, len(seconds) // MOST_POINTS)]) * 1e3
            figure.add_box(
                x=shown,
                name=label(item, device, results),
                marker_color=ROLE_COLOURS[item.role],
                boxpoints=False,
                boxmean=True,
            )
    figure.update_layout(showlegend=False, xaxis_title="milliseconds a run", xaxis_rangemode="tozero")
    return finish(figure, height=90 + 60 * sum(len(device.measured) for device in results.devices))


def by_clip(device: Device) -> go.Figure | None:
    """Latency of each clip, dense beside sparse, clips with the least work left first."""
    figure = go.Figure()
    order: list[str] = []
    for item in sorted(device.measured, key=lambda item: item.role != "sparse"):
        if not item.clips:
            continue
        clips = {clip.name: clip for clip in item.clips}
        order = order or [clip.name for clip in sorted(item.clips, key=lambda clip: (clip.kept or 0, clip.p50))]
        shown = [clips[name] for name in order if name in clips]
        figure.add_bar(
            x=[clip.name for clip in shown],
            y=[1e3 * clip.p50 for clip in shown],
            error_y={"type": "data", "symmetric": False, "array": [1e3 * (clip.p90 - clip.p50) for clip in shown],
                     "arrayminus": [0] * len(shown), "thickness": 1},
            name=f"{item.name} ({item.role})",
            marker_color=ROLE_COLOURS[item.role],
        )  # fmt: skip
    if not order:
        return None
    figure.update_layout(barmode="group", yaxis_title="ms (whisker: p90)", yaxis_rangemode="tozero")
    figure.update_xaxes(showticklabels=len(order) <= 40)
    return finish(figure)


def kept_against_latency(device: Device) -> go.Figure | None:
    """Every clip of a dynamic network: multiply-accumulates left against latency."""
    figure = go.Figure()
    for item in device.measured:
        known = [clip for clip in item.clips if clip.kept is not None]
        if item.correlation is None:
            continue
        kept = [100 * (clip.kept or 0) for clip in known]
        figure.add_scatter(
            x=kept, y=[1e3 * clip.p50 for clip in known], mode="markers", text=[clip.name for clip in known],
            name=f"{item.name}, correlation {item.correlation:.2f}", marker={"color": ROLE_COLOURS[item.role]},
        )  # fmt: skip
    if not figure.data:
        return None
    figure.update_layout(
        xaxis_title="% of the dense multiply-accumulates executed", yaxis_title="ms", showlegend=True,
        xaxis_rangemode="tozero", yaxis_rangemode="tozero",
    )  # fmt: skip
    return finish(figure)


def by_layer(device: Device, results: Results) -> go.Figure | None:
    """Where the time goes: one stacked bar an artifact."""
    profiled = [item for item in device.measured if item.profile]
    if not profiled:
        return None
    figure = go.Figure()
    most = max(len(item.profile.layers) for item in profiled if item.profile)
    for index in range(most):
        layers = [
            (item, item.profile.layers[index]) for item in profiled if item.profile and index < len(item.profile.layers)
        ]
        named = any(layer.kernel for _, layer in layers)
        figure.add_bar(
            y=[label(item, device, results) for item, _ in layers],
            x=[1e3 * layer.seconds for _, layer in layers],
            orientation="h",
            name=layers[0][1].name,
            text=[layer.name if layer.seconds > 0.06 * total(item) else "" for item, layer in layers],
            textposition="inside",
            insidetextanchor="middle",
            hovertext=[describe(layer) for _, layer in layers],
            hoverinfo="text",
            marker={"color": LAYER_COLOURS[index % len(LAYER_COLOURS)] if named else REST_COLOUR,
                    "line": {"width": 1, "color": "rgba(128,128,128,0.5)"}},
        )  # fmt: skip
    figure.update_layout(barmode="stack", showlegend=False, xaxis_title="milliseconds")
    return finish(figure, height=110 + 70 * len(profiled))


def efficiency(results: Results) -> go.Figure | None:
    """Work saved against time saved, by layer and for the whole; on the diagonal all of the saving became speed."""
    figure = go.Figure()
    largest = 1.0
    for pair in results.pairs:
        sparse, dense = _pair_of(pair, results)
        if not (sparse.profile and dense.profile):
            continue
        whole = {layer.name: layer for layer in worked(dense)}  # a controller's layers have no dense twin
        points = [
            (theirs.executed_macs / ours.executed_macs, theirs.seconds / ours.seconds, ours.name)
            for ours in worked(sparse)
            if (theirs := whole.get(ours.name)) and ours.executed_macs and ours.seconds
        ]
        figure.add_scatter(
            x=[x for x, _, _ in points], y=[y for _, y, _ in points], text=[name for _, _, name in points],
            mode="markers", name=f"layers of {sparse.name} on {pair.device}",
            marker={"color": ROLE_COLOURS["sparse"], "size": 8, "opacity": 0.75},
        )  # fmt: skip
        if pair.mac_reduction:
            figure.add_scatter(
                x=[pair.mac_reduction], y=[pair.speed_up], mode="markers", name=f"whole of {sparse.name}",
                error_y={"type": "data", "symmetric": False, "array": [pair.high - pair.speed_up],
                         "arrayminus": [pair.speed_up - pair.low]},
                marker={"color": ROLE_COLOURS["dense"], "size": 14, "symbol": "star"},
            )  # fmt: skip
        largest = max([largest, pair.mac_reduction or 1, *(x for x, _, _ in points)])
    if not figure.data:
        return None
    figure.add_scatter(
        x=[1, largest], y=[1, largest], mode="lines", name="all of the saving",
        line={"dash": "dot", "color": REST_COLOUR}, hoverinfo="skip",
    )  # fmt: skip
    figure.update_layout(xaxis_title="fold fewer multiply-accumulates", yaxis_title="fold faster")
    return finish(figure)


def tuning(path: Path) -> go.Figure:
    """The best time found so far, by trial, for each workload of a tuning log. Raises DanceError for another file."""
    best: dict[str, list[float]] = {}
    names: dict[str, str] = {}
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            record = _record(line)
            if record is None:
                continue
            workload = record["workload_id"]
            names[workload] = json.dumps(record.get("workload", workload))[:80]
            curve = best.setdefault(workload, [])
            curve.append(min([record["seconds"], *curve[-1:]]))
    except OSError as error:
        raise DanceError(f"tuning log {path} cannot be read: {error.strerror}") from None
    if not best:
        raise DanceError(f"{path} holds no trial of dance-tvm tune")
    figure = go.Figure()
    for index, (workload, curve) in enumerate(sorted(best.items(), key=lambda item: -len(item[1]))[:12]):
        colour = LAYER_COLOURS[index % len(LAYER_COLOURS)]
        figure.add_scatter(
            x=list(range(1, len(curve) + 1)), y=[curve[0] / value for value in curve], mode="lines",
            line={"shape": "hv", "color": colour}, name=workload[:8], hovertext=names[workload],
        )  # fmt: skip
    figure.update_layout(xaxis_title="trial", yaxis_title="fold faster than the first trial")
    return finish(figure)


def label(item: Measured, device: Device, results: Results) -> str:
    """A short name; the device is told where there are several."""
    name = f"{item.name} ({item.role})" if item.role != "other" else item.name
    return f"{name} on {name_of(device)}" if len(results.devices) > 1 else name


def describe(layer: Layer) -> str:
    """A layer's figures for a hovering reader."""
    words = [f"<b>{layer.name}</b>", layer.kernel, f"{1e3 * layer.seconds:.3f} ms"]
    if layer.macs:
        words.append(f"{layer.executed_macs / 1e6:.1f} of {layer.macs / 1e6:.1f} MMACs, {layer.gflops:.1f} GFLOP/s")
    kept = {"frames": layer.kept_frames, "positions": layer.kept_positions, "channels in": layer.kept_channels_in,
            "channels out": layer.kept_channels_out}  # fmt: skip
    words += [f"{share:.0%} of {what}" for what, share in kept.items() if share is not None]
    return "<br>".join(word for word in words if word)


def total(item: Measured) -> float:
    """Seconds of all layers."""
    return sum(layer.seconds for layer in item.profile.layers) if item.profile else 0.0


def worked(item: Measured) -> list[Layer]:
    """The layers that multiply, in order."""
    return [layer for layer in item.profile.layers if layer.macs] if item.profile else []


def finish(figure: go.Figure, height: int = 380) -> go.Figure:
    """The look of every chart: no background, room for labels, colours of text and lines left to the page."""
    figure.update_layout(
        height=height, margin={"l": 10, "r": 10, "t": 30, "b": 10}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": -0.2},
    )  # fmt: skip
    figure.update_xaxes(automargin=True, gridcolor="rgba(128,128,128,0.3)", zerolinecolor="rgba(128,128,128,0.5)")
    figure.update_yaxes(automargin=True, gridcolor="rgba(128,128,128,0.3)", zerolinecolor="rgba(128,128,128,0.5)")
    return figure


def _pair_of(pair: Pair, results: Results) -> tuple[Measured, Measured]:
    known = [item for device in results.devices if device.spec == pair.device for item in device.measured]
    return _named(known, pair.sparse), _named(known, pair.dense)


def _named(known: Iterable[Measured], artifact: str) -> Measured:
    return next(item for item in known if item.artifact == artifact)


def _record(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(record, dict) and record.get("status") == "trial" and record.get("seconds", 0) > 0
    return record if fits and isinstance(record.get("workload_id"), str) else None


def all_charts(results: Results, tuning_logs: Sequence[Path]) -> list[tuple[str, str, go.Figure]]:
    """(heading, explanation, figure) of everything that there is data for."""
    charts: list[tuple[str, str, go.Figure | None]] = [
        (
            "Latency",
            "Each box holds half of the runs; the whiskers reach the others but for outliers.",
            overview(results),
        )
    ]
    for device in results.devices:
        where = f" on {name_of(device)}" if len(results.devices) > 1 else ""
        charts += [
            (
                f"Where the time goes{where}",
                "One segment a layer, in order; grey is what is no layer.",
                by_layer(device, results),
            ),
            (f"Latency by clip{where}", "Clips are ordered by the work that was left of them.", by_clip(device)),
            (f"Work left and time{where}", "One point a clip.", kept_against_latency(device)),
        ]
    charts.append(
        ("Work saved and time saved", "On the dotted line, all of the saved work became speed.", efficiency(results))
    )
    charts += [(f"Tuning: {path.name}", "The best found so far, by trial.", tuning(path)) for path in tuning_logs]
    return [(heading, text, figure) for heading, text, figure in charts if figure is not None]
