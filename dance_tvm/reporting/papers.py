"""Published figures, each with the device it was measured on and the place it stands in its paper."""

from __future__ import annotations

from dataclasses import dataclass

from dance_tvm.benchmarking.results import Device, Measured, Results
from dance_tvm.core.errors import DanceError

CPU_2022, JETSON = "Snapdragon 8 Gen 1 CPU", "Jetson Nano GPU"
CPU_2020, GPU_2020 = "Snapdragon 865 CPU, 8 threads", "Snapdragon 865 GPU"
COUNTED = "counted, no device"


@dataclass(frozen=True)
class Published:
    """One figure; `network` begins the names of ours that it may stand beside, `role` says dense or sparse."""

    what: str
    value: float
    unit: str
    device: str
    place: str
    network: str = ""
    role: str = ""


@dataclass(frozen=True)
class Row:
    """A published figure and ours of the same kind, each with its own device."""

    published: Published
    ours: str
    our_device: str


PAPERS: dict[str, tuple[str, list[Published]]] = {
    "dance": (
        "DANCE: dynamic 3D CNN pruning",
        [
            Published("speed-up over the state of the art", 2.22, "x", CPU_2022, "highlights", "c3d", "speed-up"),
            Published("speed-up over the state of the art", 1.37, "x", JETSON, "highlights", "c3d", "speed-up"),
            Published("energy efficiency, up to", 1.47, "x", "devices not told apart", "highlights", "c3d", "energy"),
            Published("C3D unpruned, mean", 547, "ms", "Snapdragon CPU", "supplement, Figure 11", "c3d", "dense"),
            Published(
                "C3D pruned, fastest clip shown", 253, "ms", "Snapdragon CPU", "supplement, Figure 11", "c3d", "fastest"
            ),
            Published(
                "C3D pruned, slowest clip shown", 367, "ms", "Snapdragon CPU", "supplement, Figure 11", "c3d", "slowest"
            ),
            Published("C3D unpruned, conv2", 191.99, "ms", "edge CPU", "supplement, Figure 12", "c3d", ""),
            Published("C3D unpruned, conv3b", 164.89, "ms", "edge CPU", "supplement, Figure 12", "c3d", ""),
        ],
    ),
    "rt3d": (
        "RT3D: real-time 3D CNNs on mobile devices",
        [
            Published(f"{name} {kind}", value, "ms", device, "Table 2", network, role)
            for name, network, figures in (
                ("C3D", "c3d", (902, 357, 488, 142)),
                ("R(2+1)D", "r2plus1d", (1074, 391, 513, 141)),
                ("S3D", "s3d", (1139, 611, 565, 293)),
            )
            for (kind, role, device), value in zip(
                (
                    ("dense", "dense", CPU_2020),
                    ("KGS sparse", "sparse", CPU_2020),
                    ("dense", "dense", f"{GPU_2020}, 16 bit"),
                    ("KGS sparse", "sparse", f"{GPU_2020}, 16 bit"),
                ),
                figures,
                strict=True,
            )
        ],
    ),
    "dstep": (
        "D-STEP: dynamic spatio-temporal pruning",
        [
            Published(f"ResNet{depth} {name}", value, "GFLOPs", COUNTED, "Table 1", f"resnet{depth}", role)
            for depth, figures in (("18", (14.6, 12.2, 8.1, 6.14)), ("50", (33.2, 21.4, 16.2, 11.6)))
            for (name, role), value in zip(
                (("TSM", "dense work"), ("D-STEP high", "work"), ("D-STEP medium", "work"), ("D-STEP low", "work")),
                figures,
                strict=True,
            )
        ],
    ),
}


def beside(paper: str, results: Results) -> tuple[str, list[Row]]:
    """The paper's title and its figures with ours of the same kind. Raises DanceError for an unknown paper."""
    if paper not in PAPERS:
        raise DanceError(f"there are no figures of {paper!r}: choose one of {', '.join(PAPERS)}")
    title, figures = PAPERS[paper]
    rows = []
    for figure in figures:
        found = [(device, item) for device in results.devices for item in device.measured if _same(figure, item)]
        ours = [(device, text) for device, item in found if (text := _figure(figure, device, item, results))]
        rows += [Row(figure, text, name_of(device)) for device, text in ours] or [Row(figure, "not measured", "")]
    return title, rows


def name_of(device: Device) -> str:
    """A device by how it was reached and what it said it is; emulated ones are named as such."""
    emulated = "emulat" in device.spec
    words = ["emulated" if emulated else "", str(device.facts.get("machine", "")), f"({device.spec})"]
    return " ".join(word for word in words if word)


def _same(figure: Published, item: Measured) -> bool:
    name = item.name.lower().replace("_", "-")
    return bool(figure.network) and name.startswith(figure.network) and "mini" not in name


def _figure(figure: Published, device: Device, item: Measured, results: Results) -> str:
    """Our figure of the same kind as text, or nothing."""
    pair = next((pair for pair in results.pairs if (pair.device, pair.sparse) == (device.spec, item.artifact)), None)
    latencies = [clip.p50 for clip in item.clips]
    if figure.role == "speed-up" and pair:
        return f"{(pair.over_clips or pair).speed_up:.2f} x over our dense"
    if figure.role == "energy" and pair and pair.energy_ratio and item.energy:
        return f"{pair.energy_ratio:.2f} x over our dense ({item.energy.kind})"
    if figure.role in ("fastest", "slowest") and latencies and item.role == "sparse":
        return f"{1e3 * (min if figure.role == 'fastest' else max)(latencies):.1f} ms"
    if figure.role in ("dense", "sparse") and item.role == figure.role:
        return f"{1e3 * item.latency.p50:.1f} ms"
    if figure.role == "dense work" and item.role == "dense":
        return f"{item.macs / 1e9:.2f} GMACs"
    if figure.role == "work" and item.role == "sparse" and item.executed_macs:
        return f"{item.executed_macs / 1e9:.2f} GMACs executed"
    return ""
