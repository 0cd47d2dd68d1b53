"""Is it right before how fast is it: a device's outputs against those that the build stored."""

from __future__ import annotations

import numpy as np

from dance_tvm.artifact.folder import Artifact
from dance_tvm.benchmarking.layers import layers_run
from dance_tvm.benchmarking.results import Validation
from dance_tvm.core.agreement import allowed_of, difference
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.device import KernelTime, LoadedNetwork

# Means of a kernel's values differ less between processors than single values do; wrong code is far beyond this.
MEAN_TOLERANCE = 1e-3


def validate(artifact: Artifact, network: LoadedNetwork, device: str) -> Validation:
    """Raises DanceError naming the first layer that diverges where the device computes something else."""
    reference = artifact.reference()
    inputs = random_inputs(artifact.manifest.inputs)
    found = network.run(inputs)
    expected = {name.partition(":")[2]: array for name, array in reference.items() if name.startswith("output:")}
    if not expected:
        return Validation(status="not stored")
    differences = {name: difference(found[name], array) for name, array in expected.items()}
    allowed = _allowed(artifact, expected)
    name = max(differences, key=lambda name: differences[name] - allowed[name])
    if differences[name] > allowed[name]:
        where = _first_divergence(artifact, network, reference.get("kernels"))
        raise DanceError(
            f"{artifact.path} computes something else on {device} than its source: output {name} differs by "
            f"{differences[name]:.3g} of its largest value (allowed {allowed[name]:.3g}){where}; no latency is "
            "reported for a wrong result"
        )
    return Validation(status="passed", difference=differences[name], allowed=allowed[name])


def _allowed(artifact: Artifact, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """By output, what the check of the build allowed on the input that was stored, or what checks allow."""
    manifest = artifact.manifest
    bounds = {output.output: output.allowed for output in manifest.check.outputs if output.input == "normal"}
    return {name: max(bounds.get(name, 0.0), allowed_of(array, manifest.tolerance)) for name, array in expected.items()}


def _first_divergence(artifact: Artifact, network: LoadedNetwork, stored: np.ndarray | None) -> str:
    """The first layer whose values have another mean than at the build, as the end of a sentence."""
    if stored is None:
        return ", and the build stored nothing of its layers"
    try:
        calls = network.kernels(random_inputs(artifact.manifest.inputs), repeats=0)
    except DanceError:
        return ", and this device cannot show its layers"
    if len(calls) != len(stored):
        return f", and it calls {len(calls)} kernels instead of {len(stored)}"
    for (call, layer), (mean, size) in zip(layers_run(artifact.manifest, calls), stored, strict=True):
        if call.mean is not None and not _alike(call, mean, size):
            name = f"layer {layer.name} ({call.symbol})" if layer else f"operator {call.symbol}"
            return f", first in {name}"
    return ", though every layer's mean is right"


def _alike(call: KernelTime, mean: float, size: float) -> bool:
    bound = MEAN_TOLERANCE * max(size, 1e-6)
    return abs((call.mean or 0.0) - mean) <= bound and abs((call.mean_size or 0.0) - size) <= bound
