"""At which densities a network's layers are tuned: those that its own clips show."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dance_tvm.core.errors import DanceError
from dance_tvm.schedules.workload import Workload

#: Clips that are looked at.
CLIPS = 16
#: Densities that differ by less are one: records are to serve other networks too.
STEP = 1 / 8


def kept_shares(model: str | Path | Any, clips: str, weights: Path | None = None) -> dict[str, float]:
    """Share of its multiply-accumulates that each layer executes, in the mean over clips; padding is counted as work.

    The network is built for this machine, whatever it is tuned for: what lives does not depend on the target. Its
    kernels are direct ones, which execute a multiply-accumulate for each that is alive; Winograd's execute others.
    ``clips`` is what ``dance-tvm bench --clips`` takes. Raises DanceError where clips do not fit the network.
    """
    from dance_tvm.benchmarking.clips import load_clips
    from dance_tvm.benchmarking.layers import profile
    from dance_tvm.compiler.build import build_network
    from dance_tvm.compiler.pipeline import Options
    from dance_tvm.device import open_device

    with tempfile.TemporaryDirectory(prefix="dance_tvm_calibrate_") as folder:
        options = Options(conv="direct")
        built = build_network(model, Path(folder) / "network", weights=weights, options=options, check=False)
        artifact = built.artifact
        found: dict[str, list[float]] = {}
        with open_device("local") as device:
            network = device.load(artifact)
            for name, inputs in load_clips(clips, artifact.manifest, CLIPS):
                seen = profile(artifact.manifest, network.kernels(inputs, repeats=0), 0.0, name)
                for layer in seen.layers:
                    if layer.macs:
                        found.setdefault(layer.name, []).append(layer.executed_macs / layer.macs)
    if not found:
        raise DanceError(f"--clips {clips}: there is no clip to look at")
    return {name: float(np.mean(shares)) for name, shares in found.items()}


def density_of(workload: Workload, share: float) -> float:
    """The density of each of a workload's lists at which it does ``share`` of the dense layer's work, in eighths.

    ``share`` is of all taps, those that fall on padding included, which no kernel executes.
    """
    options = [step * STEP for step in range(1, round(1 / STEP) + 1)]
    window = workload.window
    executed = share * window.positions_out * window.taps * workload.depth * workload.channels_out
    return min(options, key=lambda density: abs(workload.at(density).work - executed))
