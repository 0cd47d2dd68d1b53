"""How far each layer of a built network is from the same layer of its source, which is evaluated in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dance_tvm.artifact.folder import Artifact
from dance_tvm.artifact.interface.dance_model import Model
from dance_tvm.artifact.layers import LayerInfo, layers_called
from dance_tvm.device import serve
from dance_tvm.device.session import kernel_table
from dance_tvm.frontend.interface import array_of
from dance_tvm.frontend.interpreter import trace
from dance_tvm.lowering.lowered import Lowered

if TYPE_CHECKING:
    from dance_tvm.frontend.interface import Arrays


@dataclass(frozen=True)
class LayerError:
    """One layer's values beside its source's, errors of the layers before it among them.

    ``signal_to_noise`` is ten times the decimal logarithm of the squares' sums, in dB, infinite where nothing differs,
    and ``worst`` that of the channel ``worst_channel``, the lowest; ``difference`` the largest one as a share of the
    layer's largest value. ``compared`` is the share of its values that the build computed: the rest is never read.
    """

    layer: str
    kernel: str
    signal_to_noise: float
    worst_channel: int
    worst: float
    difference: float
    compared: float


@dataclass(frozen=True)
class _Written:
    """What a layer's kernel wrote (values, C), and which of all values of its ``shape`` (N, T, H, W, C) they are."""

    info: LayerInfo
    values: np.ndarray
    alive: np.ndarray
    channels: np.ndarray | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerErrors:
    """Those of a network's layers in order, and the names of layers that cannot be compared: they run within a kernel
    of several, or the compiler gave their values another form."""

    layers: list[LayerError]
    left_out: list[str]


def layer_errors(artifact: Artifact, lowered: Lowered, arrays: Arrays) -> LayerErrors:
    """The errors of each layer of the artifact made of ``lowered``, on one input."""
    assert lowered.source is not None
    seen, calls = _seen(artifact, arrays), lowered.calls
    wanted = {calls[layer.info.name].source for layer in seen}
    named = dict(zip((param.name for param in lowered.source["main"].params), arrays.values(), strict=True))
    source = {
        name: array_of(value)
        for name, value in trace(lowered.source, named, wide=True)
        if name in wanted and isinstance(value, torch.Tensor)
    }
    errors = []
    for layer in seen:
        expected = _arranged(source.get(calls[layer.info.name].source), layer)
        if expected is not None:
            errors.append(_compared(layer, expected))
    compared = {error.layer for error in errors}
    return LayerErrors(errors, [layer.name for layer in artifact.manifest.layers if layer.name not in compared])


def _seen(artifact: Artifact, arrays: Arrays) -> list[_Written]:
    """What each layer's kernel wrote in one run, copied: later kernels overwrite it."""
    manifest = artifact.manifest
    table, calls = kernel_table(manifest), list[tuple[str, tuple[Any, ...] | None]]()
    # Of equal kernels some may run within others: which call is which layer's is then unknown.
    joined = {part for kernel in manifest.kernels.values() for part in kernel.parts}
    with_layer = {layer.kernel for layer in manifest.layers} - joined

    def look(symbol: str, tensors: list[np.ndarray]) -> None:
        kernel = table.get(symbol)
        wanted = kernel is not None and kernel["name"] in with_layer
        calls.append((symbol, _values(kernel, tensors) if kernel is not None and wanted else None))

    Model(artifact.path, manifest.target.threads, verified=True).watch(arrays, look)
    layers = layers_called(manifest.layers, manifest.kernels, [symbol for symbol, _ in calls])
    return [
        _Written(info, *values)
        for info, (_, values) in zip(layers, calls, strict=True)
        if info is not None and values is not None
    ]


def _values(
    kernel: dict[str, Any], tensors: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, tuple[int, ...]] | None:
    """What a call wrote, of which positions and channels, and the shape of the whole; None where lists leave out what
    cannot be told."""
    named = dict(zip(kernel["operands"], map(serve.Seen.of, tensors), strict=True))
    if "y" not in named:
        return None
    whole = serve.result_of(kernel, named)
    alive, channels = np.ones(whole.shape[:-1], bool), None
    if kernel["kind"] == serve.CONVOLUTION:
        if (found := serve.executed(kernel, named)) is None:
            return None
        _, alive, channels = found
        alive = alive.reshape(whole.shape[:-1])
    elif any("out_" in operand for operand in kernel["operands"]):
        return None
    if channels is not None:  # a list of each sample's: that of the first is known
        alive = alive & (np.arange(len(alive)) == 0).reshape(-1, *[1] * (alive.ndim - 1))
        channels = np.array(channels)
    return whole[alive].astype(np.float64), alive, channels, whole.shape


def _arranged(source: np.ndarray | None, layer: _Written) -> np.ndarray | None:
    """The source's value as the kernel lays it out: channels innermost, but for linear layers, whose are so already."""
    if source is None or source.size != math.prod(layer.shape):
        return None
    channels = layer.shape[-1]
    if layer.info.kind != "linear" and source.ndim > 1:
        if source.shape[1] != channels:
            return None
        source = np.moveaxis(source, 1, -1)
    return source.reshape(layer.shape).astype(np.float64) if source.shape[-1] == channels else None


def _compared(layer: _Written, expected: np.ndarray) -> LayerError:
    wanted, found = expected[layer.alive], layer.values
    numbers = np.arange(layer.shape[-1]) if layer.channels is None else layer.channels
    wanted, found = wanted[:, numbers], found[:, numbers]
    signal, noise = (wanted**2).sum(0), ((found - wanted) ** 2).sum(0)
    by_channel = [_decibels(*pair) for pair in zip(signal, noise, strict=True)]
    worst = int(np.argmin(by_channel)) if by_channel else 0
    return LayerError(
        layer=layer.info.name,
        kernel=layer.info.kernel,
        signal_to_noise=_decibels(float(signal.sum()), float(noise.sum())),
        worst_channel=int(numbers[worst]) if by_channel else 0,
        worst=by_channel[worst] if by_channel else math.inf,
        difference=float(np.abs(found - wanted).max(initial=0.0) / max(np.abs(wanted).max(initial=0.0), 1e-30)),
        compared=wanted.size / expected.size if expected.size else 1.0,
    )


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
