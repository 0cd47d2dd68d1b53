"""The page and its Markdown twin: the same tables, and charts where a browser shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from dance_tvm.benchmarking.results import Device, Layer, Measured, Results, Verdict
from dance_tvm.core.errors import DanceError
from dance_tvm.core.files import written_whole
from dance_tvm.core.printing import counted, duration
from dance_tvm.reporting import why
from dance_tvm.reporting.charts import Chart, all_charts, place_of
from dance_tvm.reporting.papers import beside, name_of
from dance_tvm.reporting.tables import Cell, Link, Table, as_html, as_markdown

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Page:
    """What a page says, whatever form it takes; the charts stand behind the first table."""

    title: str
    subtitle: str
    tiles: list[tuple[str, str]]
    verdicts: list[tuple[str, str]]
    warnings: list[str]
    tables: list[Table]
    charts: list[Chart]
    pictures: list[dict[str, str]]
    command: str


def page_of(results: Results, papers: Sequence[str] = (), tuning_logs: Sequence[Path] = ()) -> Page:
    """The page of one call of bench."""
    return Page(
        title=title_of(results),
        subtitle=subtitle_of(results),
        tiles=tiles(results),
        verdicts=[(verdict.verdict, _told(verdict)) for verdict in results.verdicts],
        warnings=warnings_of(results),
        tables=tables(results, papers, tuning_logs),
        charts=all_charts(results, tuning_logs),
        pictures=_pictures(results),
        command=results.command,
    )


def of_chart(title: str, chart: Chart) -> Page:
    """A page of one chart and its table."""
    return Page(title, "", [], [], [], [], [chart], [], "")


def html(page: Page) -> str:
    """One file that needs nothing from outside, and no script. Raises DanceError where jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise DanceError(f"pages need the {error.name} package: pip install 'dance-tvm[report]'") from None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, table=as_html)


def markdown(page: Page) -> str:
    """The tables, those of the charts too, for places that show no page."""
    lines = [f"# {page.title}", "", page.subtitle, ""]
    lines += [f"- **{value}** {text}" for value, text in page.tiles] + [""]
    lines += [f"- {text}" for _, text in page.verdicts] + [f"> {warning}" for warning in page.warnings] + [""]
    of_charts = [replace(chart.table, title=chart.heading, text=chart.text) for chart in page.charts]
    for table in [*page.tables[:1], *of_charts, *page.tables[1:]]:
        lines += as_markdown(table)
    return "\n".join([*lines, "## Repeat it", "", f"    {page.command}", ""])


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises DanceError where that fails."""
    with written_whole(path, "--out") as beside_it:
        beside_it.write_text(text, encoding="utf-8")


def title_of(results: Results) -> str:
    """The networks and the devices."""
    names = dict.fromkeys(item.name for device in results.devices for item in device.measured)
    return f"{', '.join(names)} on {', '.join(name_of(device) for device in results.devices)}"


def subtitle_of(results: Results) -> str:
    """When and by what it was measured."""
    return f"Measured by dance-tvm bench, {results.created}, from {results.host.get('system', 'this machine')}."


def tiles(results: Results) -> list[tuple[str, str]]:
    """The few figures that a reader in a hurry takes along."""
    found = []
    for pair in results.pairs:
        many = pair.over_clips
        if many:
            span = f"in the mean of {counted(many.count, 'clip')}, {many.least:.2f} to {many.most:.2f} by clip"
        else:
            span = f"95% in {pair.low:.2f}–{pair.high:.2f}"
        found.append((f"{(many or pair).speed_up:.2f}×", f"as fast as dense, {span}"))
        if saved := (many or pair).mac_reduction:
            found.append((f"{saved:.2f}×", "fewer multiply-accumulates executed"))
        if pair.efficiency:
            found.append((f"{pair.efficiency:.0%}", "of the saved work became speed"))
        if pair.energy_ratio:
            on = "on the first clip" if many else "a clip"
            found.append((f"{pair.energy_ratio:.2f}×", f"less energy {on} ({_energy_kind(results)})"))
    for device in results.devices:
        for item in device.measured:
            if item.role != "dense":
                took, of = item.latency.p50, counted(item.latency.runs, "run")
                if len(item.clips) > 1:
                    took, of = median(clip.p50 for clip in item.clips), counted(len(item.clips), "clip")
                found.append((duration(took), f"median of {of}, {item.name}"))
                found.append((f"{item.frames / took:,.0f}", f"frames a second, {item.name}"))
    return found[:12]


def warnings_of(results: Results) -> list[str]:
    """What speaks against trusting the figures, and what they leave out."""
    found = [f"{name_of(device)}: {warning}" for device in results.devices for warning in device.warnings]
    notes = dict.fromkeys(
        f"{item.name}: {note}" for device in results.devices for item in device.measured for note in item.notes
    )
    return found + list(notes)


def tables(results: Results, papers: Sequence[str] = (), tuning_logs: Sequence[Path] = ()) -> list[Table]:
    """Every table of the page but those of the charts, the summary first."""
    found = [_summary(results)]
    for device in results.devices:
        found += [_layers(device, item) for item in device.measured if item.profile]
    found += why.tables(results, tuning_logs)
    found += [_paper(paper, results) for paper in papers]
    extras = [_peers(results), _accuracy(results), _loading(results), _streams(results)]
    return found + [table for table in extras if table.rows] + [_facts(results)]


def _summary(results: Results) -> Table:
    heads = ["network", "device", "checked", "p50", "p90", "p99", "spread", "frames/s", "GMACs", "executed",
             "GFLOP/s", "of peak", "memory", "energy"]  # fmt: skip
    rows = []
    for device in results.devices:
        for item in device.measured:
            times = [duration(value) for value in (item.latency.p50, item.latency.p90, item.latency.p99)]
            executed = f"{item.executed_macs / item.macs:.0%}" if item.executed_macs and item.macs else "–"
            memory = f"{item.peak_memory_bytes / 2**20:.0f} MiB" if item.peak_memory_bytes else "–"
            joules = f"{1e3 * item.energy.joules:.2f} mJ, {item.energy.kind}" if item.energy else "–"
            rows.append([
                item.title, name_of(device), item.validation.status, *times, f"{item.latency.spread:.1%}",
                f"{item.frames_per_second:,.0f}", f"{item.macs / 1e9:.3f}", executed, _number(item.gflops, ".1f"),
                _number(item.share_of_peak, ".0%"), memory, joules,
            ])  # fmt: skip
    text = "Executed are the multiply-accumulates that the index lists left; outputs are checked before any timing."
    return Table("Summary", text, heads, rows, words=3)


def _layers(device: Device, item: Measured) -> Table:
    heads = ["layer", "kernel", "time", "MMACs executed", "of dense", "frames", "positions", "channels in",
             "channels out", "GFLOP/s", "MB"]  # fmt: skip
    assert item.profile is not None
    rows = [
        [_name(device, item, layer), layer.kernel, duration(layer.seconds), f"{layer.executed_macs / 1e6:.2f}",
         _number(layer.executed_macs / layer.macs if layer.macs else None, ".0%"), _number(layer.kept_frames, ".0%"),
         _number(layer.kept_positions, ".0%"), _number(layer.kept_channels_in, ".0%"),
         _number(layer.kept_channels_out, ".0%"), f"{layer.gflops:.1f}", f"{layer.bytes / 1e6:.2f}"]
        for layer in item.profile.layers
    ]  # fmt: skip
    text = (
        f"{item.profile.clip} on {name_of(device)}: the layers add up to {item.profile.explained:.0%} of the run's "
        f"{duration(item.profile.whole_seconds)}. Of dense is the share done of all of a layer's multiply-accumulates: "
        "masks, pruned weights and padding leave the rest out."
    )
    return Table(f"Layers of {item.title}", text, heads, rows, words=2)


def _name(device: Device, item: Measured, layer: Layer) -> Cell:
    """The layer's name, leading to why it has its kernel where the artifact says so."""
    return Link(layer.name, place_of(device, item, layer.name)) if layer.why or layer.tuned else layer.name


def _paper(paper: str, results: Results) -> Table:
    title, rows = beside(paper, results)
    cells = [
        [row.published.what, f"{row.published.value:g} {row.published.unit}", row.published.device, row.published.place,
         row.ours, row.our_device]
        for row in rows
    ]  # fmt: skip
    text = "Each figure stands with its own device: figures of different devices are not to be divided by each other."
    return Table(
        f"Beside the paper: {title}",
        text,
        ["what", "published", "their device", "place", "ours", "our device"],
        cells,
        words=6,
    )


def _streams(results: Results) -> Table:
    rows = [
        [item.name, name_of(device), f"{item.single_stream['queries']:.0f}", f"{item.single_stream['seconds']:.0f} s",
         duration(item.single_stream["p90"]), f"{item.single_stream['queries_per_second']:.2f}"]
        for device in results.devices
        for item in device.measured
        if item.single_stream
    ]  # fmt: skip
    heads = ["network", "device", "queries", "for", "p90", "queries/s"]
    return Table(
        "Single stream", "One query after the other; the 90th percentile counts (MLPerf inference).", heads, rows, 2
    )


def _peers(results: Results) -> Table:
    rows = [
        [each.engine, each.version, each.artifact, duration(each.latency.p50), f"{each.speed_up:.2f}",
         f"{each.low:.2f} to {each.high:.2f}", f"{each.difference:.1g}"]
        for each in results.peers
    ]  # fmt: skip
    heads = [
        "engine",
        "version",
        "beside",
        "its p50",
        "ours is faster",
        "95% interval",
        "outputs differ",
    ]
    return Table("Other engines", "The same network on the same input, in turns with ours.", heads, rows, 3)


def _accuracy(results: Results) -> Table:
    rows = [
        [item.name, name_of(device), str(known.clips), f"{known.top1:.1%}", f"{known.top5:.1%}", str(known.videos),
         f"{known.video_top1:.1%}", f"{known.video_top5:.1%}"]
        for device in results.devices
        for item in device.measured
        if (known := item.accuracy)
    ]  # fmt: skip
    heads = ["network", "device", "clips", "right", "among five", "videos", "right", "among five"]
    return Table("Accuracy", "Of a video the mean of its clips' scores counts.", heads, rows, 2)


def _loading(results: Results) -> Table:
    rows = [
        [item.name, "cold" if each.cold else "warm",
         *map(duration, (each.verify, each.load, each.first_run, each.verify + each.load + each.first_run))]
        for device in results.devices
        for item in device.measured
        for each in item.loading
    ]  # fmt: skip
    text = "In a process of its own that has TVM loaded; cold: the files were not in memory."
    return Table("Until the first answer", text, ["network", "start", "verify", "load", "first run", "whole"], rows, 2)


def _facts(results: Results) -> Table:
    rows = []
    for device in results.devices:
        facts = {key: value for key, value in device.facts.items() if key in ("machine", "system", "cpus", "tvm")}
        rows.append(
            [f"device {device.spec}", ", ".join(f"{key} {value}" for key, value in facts.items()) or "reports nothing"]
        )
        for item in device.measured:
            rows.append([item.title, f"{item.artifact}, built for {item.target}, {item.threads} threads"])
            rows.append(["its library", f"SHA-256 {item.library_sha256}"])
    return Table("Artifacts and devices", "What was measured, and where.", ["", "fact"], rows, words=2)


def _pictures(results: Results) -> list[dict[str, str]]:
    from dance_tvm.reporting.liveness import shade

    found = []
    for device in results.devices:
        for item in device.measured:
            for picture in item.pictures:
                for layer in picture.layers if picture.strip else ():
                    caption = f"{item.name}, {picture.clip}, layer {layer.layer}"
                    found.append({"caption": caption, "data": shade(picture, layer)})
    return found


def _told(verdict: Verdict) -> str:
    return (
        f"{verdict.artifact} on {verdict.device}: {verdict.verdict}, {verdict.ratio:.3f} of the baseline's time "
        f"(95% between {verdict.low:.3f} and {verdict.high:.3f})"
    )


def _energy_kind(results: Results) -> str:
    kinds = {item.energy.kind for device in results.devices for item in device.measured if item.energy}
    return ", ".join(sorted(kinds))


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)
