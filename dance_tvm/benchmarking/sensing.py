"""What a device's sensors say of a measurement: energy, clocks, heat."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dance_tvm.benchmarking.results import Energy, Latency
from dance_tvm.benchmarking.statistics import SLOWED
from dance_tvm.core.errors import DanceError
from dance_tvm.machines.target import Energy as Coefficients
from dance_tvm.machines.target import Target

COOL_DEGREES = 2.0
MOST_COOL_DOWN_S = 120.0
SLOW_CLOCK = 0.9
#: More than this times the median for one run in ten is reported.
DISTURBED = 2.0


def energy(
    before: dict[str, Any], after: dict[str, Any], watts: list[float], seconds: float, runs: int
) -> Energy | None:
    """Joules of one run from the device's counters, or from its power readings; None where it has neither.

    `before` and `after` are sensor readings around `runs` runs of one network alone, `seconds` long altogether;
    `watts` are the readings in between. What the whole package drew is counted, idle power too.
    """
    counters = set(before.get("microjoules", {})) & set(after.get("microjoules", {}))
    packages = [name for name in counters if name.startswith("package")] or list(counters)
    used = [_counted(name, before, after) for name in packages]
    if used and None not in used:
        joules = sum(filter(None, used)) * 1e-6 / runs
        return Energy(kind="measured", source="RAPL counters of the processor package", joules=joules)
    if watts:
        return Energy(kind="measured", source="power sensor, sampled", joules=float(np.mean(watts)) * seconds / runs)
    return None


def _counted(name: str, before: dict[str, Any], after: dict[str, Any]) -> int | None:
    """Microjoules that a counter counted; None where it began again and does not say after how much it does."""
    used = after["microjoules"][name] - before["microjoules"][name]
    if used >= 0:
        return used
    most = after.get("most_microjoules", {}).get(name)
    return None if most is None else used + most


def estimate(coefficients: Coefficients, executed_macs: int, moved_bytes: int) -> Energy:
    """Joules of one run from multiply-accumulates and the bytes of every kernel's tensors."""
    joules = 1e-12 * (coefficients.pj_per_mac * executed_macs + coefficients.pj_per_byte * moved_bytes)
    source = (
        f"{coefficients.pj_per_mac:g} pJ a multiply-accumulate and {coefficients.pj_per_byte:g} pJ a byte "
        f"of the target file"
    )
    return Energy(kind="estimate", source=source, joules=joules)


def watts_of(sensors: dict[str, Any]) -> float | None:
    """The power that a board's sensors read now: of the rail that feeds all others where it has one, else of all."""
    rails = sensors.get("milliwatts", {})
    total = [value for name, value in rails.items() if name.lower().endswith(("_in", " total"))]
    return (sum(total) if total else sum(rails.values())) / 1000 if rails else None


def hottest(sensors: dict[str, Any]) -> float | None:
    """Degrees Celsius of the hottest place; None where nothing reports it."""
    readings = sensors.get("millidegrees", {}).values()
    return max(readings) / 1000 if readings else None


def warnings(before: dict[str, Any], after: dict[str, Any], figures: dict[str, Latency]) -> list[str]:
    """What speaks against trusting the figures: slowing down, low clocks, a power-saving governor."""
    found = []
    for name, latency in figures.items():
        if latency.trend > SLOWED:
            found.append(f"{name} became {latency.trend - 1:.0%} slower during the measurement: throttled or disturbed")
        if latency.p90 > DISTURBED * latency.p50:
            found.append(
                f"one run of {name} in ten took {latency.p90 / latency.p50:.1f} times the median or longer: "
                "other programs run beside it"
            )
        if not latency.steady:
            found.append(f"{name} did not settle during warm-up")
    governors = {name for name in after.get("governor", {}).values() if name not in ("performance", "")}
    if governors:
        found.append(f"the clock governor is {', '.join(sorted(governors))}: performance gives steadier figures")
    slow = [
        cpu
        for cpu, clock in after.get("khz", {}).items()
        if cpu in before.get("khz", {}) and clock < SLOW_CLOCK * before["khz"][cpu]
    ]
    if slow:
        found.append(f"the clock of {', '.join(sorted(slow))} fell by more than a tenth: throttled")
    return found


def cool_down(sensors: Callable[[], dict[str, Any]], start: dict[str, Any], seconds: float) -> None:
    """Wait `seconds`, or until the device is as cool as it was at the start, where it reports that."""
    target = hottest(start)
    if target is None:
        time.sleep(seconds)
        return
    deadline = time.monotonic() + min(MOST_COOL_DOWN_S, seconds * 10)
    while (now := hottest(sensors())) is not None and now > target + COOL_DEGREES and time.monotonic() < deadline:
        time.sleep(min(1.0, seconds))


def cpus_of_cluster(target: Target, name: str, sensors: dict[str, Any]) -> list[int]:
    """The CPUs of the cluster `name` of the target file: those whose highest clock is nearest to the cluster's."""
    clusters = {cluster.name: cluster for cluster in target.clusters}
    if name not in clusters:
        raise DanceError(f"target {target.name} has no cluster {name!r}: it has {', '.join(clusters)}")
    clocks = {int(cpu.removeprefix("cpu")): khz / 1e6 for cpu, khz in sensors.get("max_khz", {}).items()}
    if not clocks:
        raise DanceError("the device does not report its cores' clocks: give --cpus instead of --cluster")
    nearest = {
        cpu: min(clusters.values(), key=lambda cluster: abs(cluster.max_ghz - ghz)).name for cpu, ghz in clocks.items()
    }
    return sorted(cpu for cpu, cluster in nearest.items() if cluster == name)


@dataclass
class Watcher:
    """Reads power between the rounds of a measurement."""

    sensors: Callable[[], dict[str, Any]]
    watts: list[float] = field(default_factory=list)

    def look(self) -> None:
        """Take one reading."""
        reading = watts_of(self.sensors())
        if reading is not None:
            self.watts.append(reading)
