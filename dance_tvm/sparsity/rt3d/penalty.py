"""The regularisation terms of RT3D's section 4: group lasso (equation 2) and reweighted (equation 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from dance_tvm.sparsity.rt3d.pruning import Budget, Layer, Prunable, layer_rms
from dance_tvm.sparsity.rt3d.schemes import Scheme


class Penalty:
    """``strength * sum over layers and units of factor * penalty * norm``, added to the loss.

    Norms are taken in the layer's own unit, so that one lambda serves layers of any fan-in: a unit's norm is divided
    by the root of its size and by ``reference``, the layer's root mean square before pruning, and is about 1 at first.
    ``penalty`` is 1 for every unit (group lasso) until ``reweight`` sets it from the current weights. ``factor`` is 1
    when parameters are the budget and the layer's multiply-accumulates, relative to the mean layer's, when they are
    (end of section 4): ``strength``, the paper's lambda, then means the same for both.
    """

    def __init__(
        self,
        prunable: Prunable,
        scheme: Scheme,
        *,
        strength: float = 2e-3,
        mix: float = 0.5,
        epsilon: float = 0.1,
        budget: Budget = "macs",
    ) -> None:
        self._prunable, self._scheme = prunable, scheme
        self._strength, self._mix, self._epsilon = strength, mix, epsilon
        macs = {layer.name: layer.weight.numel() * layer.positions for layer in prunable.layers}
        mean = sum(macs.values()) / len(macs)
        self._factors = {name: count / mean if budget == "macs" else 1.0 for name, count in macs.items()}
        self.penalties: dict[str, Tensor] = {}
        self.reference = {layer.name: layer_rms(layer.weight) for layer in prunable.layers}

    def __call__(self) -> Tensor:
        """The term for the current weights, a differentiable scalar."""
        terms = []
        for layer in self._prunable.layers:
            norms = self._norms(layer)
            penalty = self.penalties.get(layer.name)
            total = norms.sum() if penalty is None else (penalty * norms).sum()
            terms.append(self._factors[layer.name] * total)
        return self._strength * torch.stack(terms).sum()

    @torch.no_grad()
    def reweight(self) -> None:
        """Equation 3's update: 1 / (norm squared + epsilon), so that small units are pressed and large ones spared."""
        for layer in self._prunable.layers:
            norms = self._norms(layer)
            self.penalties[layer.name] = 1 / (norms.square() + self._epsilon)

    def _norms(self, layer: Layer) -> Tensor:
        sizes = self._scheme.sizes(layer.weight)
        norms = self._scheme.norms(layer.weight, self._mix)
        return norms / (sizes.sqrt() * self.reference[layer.name].to(norms))
