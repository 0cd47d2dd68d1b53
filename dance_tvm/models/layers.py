"""What several networks share."""

from __future__ import annotations

from torch import nn


def seed_weights(network: nn.Module) -> None:
    """Draw weights that keep activations of one size through ReLU layers, so that random networks are worth comparing.

    Kaiming-normal over the fan-in, zero biases, identity batch norms.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv3d, nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
