"""Figures of many noisy runs: percentiles, whether they settled, and whether two of them differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from dance_tvm.benchmarking.results import Latency, Verdict

CONFIDENCE = 0.95
RESAMPLES = 2000
SLOWED = 1.05  # the last fifth of the runs against the first: more than this is reported


def latency(seconds: Sequence[float], warm_up_runs: int, steady: bool) -> Latency:
    """The figures of the runs; `spread` is half of the range from the 16th to the 84th percentile over the median,
    `trend` the median of the last fifth over that of the first."""
    runs = np.asarray(seconds)
    p16, p50, p84, p90, p99 = np.percentile(runs, [16, 50, 84, 90, 99])
    fifth = max(1, len(runs) // 5)
    return Latency(
        runs=len(runs),
        p50=p50,
        p90=p90,
        p99=p99,
        mean=runs.mean(),
        spread=(p84 - p16) / 2 / p50,
        fastest=runs.min(),
        warm_up_runs=warm_up_runs,
        steady=steady,
        trend=float(np.median(runs[-fifth:]) / np.median(runs[:fifth])),
        seconds=[float(second) for second in runs],
    )


def median_interval(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median of runs, with its 95% bootstrap interval."""
    return _interval(lambda sample, axis=-1: np.median(sample, axis=axis), np.asarray(seconds))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios of runs measured in turns, with its 95% bootstrap interval.

    What slows the machine down for a while slows both sides of a pair, and so drops out.
    """
    count = min(len(numerator), len(denominator))
    ratios = np.asarray(numerator[:count]) / np.asarray(denominator[:count])
    return _interval(lambda sample, axis=-1: np.median(sample, axis=axis), ratios)


def unpaired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians of runs measured at different times, with its 95% bootstrap interval."""

    def ratio(new: np.ndarray, old: np.ndarray, axis: int = -1) -> Any:
        return np.median(new, axis=axis) / np.median(old, axis=axis)

    return _interval(ratio, np.asarray(numerator), np.asarray(denominator))


def _interval(statistic: Callable[..., Any], *samples: np.ndarray) -> tuple[float, float, float]:
    middle = float(statistic(*samples))
    if min(len(sample) for sample in samples) < 2 or all(np.ptp(sample) == 0 for sample in samples):
        return middle, middle, middle
    from scipy.stats import bootstrap  # takes a second to load

    found = bootstrap(
        samples,
        statistic,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return middle, float(found.low), float(found.high)


def judge(
    device: str, artifact: str, ratio: tuple[float, float, float], threshold: float, interleaved: bool
) -> Verdict:
    """Slower only if the whole interval lies above 1 + threshold; undecided if the interval is wider than that."""
    middle, low, high = ratio
    verdict: Literal["faster", "same", "slower", "undecided"]
    if low > 1 + threshold:
        verdict = "slower"
    elif high < 1 / (1 + threshold):
        verdict = "faster"
    elif high <= 1 + threshold and low >= 1 / (1 + threshold):
        verdict = "same"
    else:
        verdict = "undecided"
    return Verdict(
        device=device,
        artifact=artifact,
        ratio=middle,
        low=low,
        high=high,
        threshold=threshold,
        interleaved=interleaved,
        verdict=verdict,
    )
