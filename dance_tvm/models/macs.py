"""Exact multiply-accumulate counts of a network, layer by layer, without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

#: The shapes of a call's first input and its output.
Call = tuple[tuple[int, ...], tuple[int, ...]]
#: By a module's name, its calls.
Calls = dict[str, list[Call]]


@dataclass(frozen=True)
class LayerMacs:
    """One layer's dense count: every tap of every output, also the taps that fall on padding, as papers count.

    ``calls`` has an entry for each time that it runs in one call of the network; it is () for a module whose products
    are functional calls (a matmul in ``forward``).
    """

    name: str
    kind: str
    macs: int
    calls: tuple[Call, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The first input of its last call."""
        return self.calls[-1][0] if self.calls else ()


def count_layers(model: nn.Module, *inputs: torch.Tensor) -> list[LayerMacs]:
    """The layers of ``model`` that multiply matrices, in the order they run, with their counts for ``inputs``.

    Convolutions (transposed too), linear layers and functional matrix products count; additions, norms and
    activations do not. Works only on shapes: nothing is computed, and ``model`` is left unchanged.
    """
    modules = dict(model.named_modules())
    counter, calls = _run(model, inputs)
    # A multiply-accumulate is two operations in the counter.
    totals = {
        key.partition(".")[2]: sum(operations.values()) // 2
        for key, operations in counter.get_flop_counts().items()
        if key != "Global"
    }
    layers = []
    for name in calls:
        inner = _outermost([child for child in totals if child != name and (not name or child.startswith(f"{name}."))])
        own = totals.get(name, 0) - sum(totals.get(child, 0) for child in inner)
        if own:
            kind = type(modules[name]).__name__
            layers.append(LayerMacs(name, kind, own) if inner else LayerMacs(name, kind, own, tuple(calls[name])))
    return layers


def _outermost(names: list[str]) -> list[str]:
    """Those of ``names`` that no other holds: a module may call a grandchild past the child between them."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def count(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-accumulates of one call of ``model`` on ``inputs``, those of a module under two names once."""
    return _run(model, inputs)[0].get_total_flops() // 2


def _run(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[FlopCounterMode, Calls]:
    """One call on shapes alone: what it counts, and the calls of each module, in the order of their first ones."""
    calls: Calls = {}
    hooks = [module.register_forward_hook(_note_call(name, calls)) for name, module in model.named_modules()]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.to("meta") for name, tensor in state.items()}
    was_training = model.training
    try:
        with FlopCounterMode(display=False, depth=1000) as counter, torch.no_grad():
            torch.func.functional_call(model.eval(), on_meta, tuple(x.to("meta") for x in inputs))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return counter, calls


def _note_call(name: str, calls: Calls) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        calls.setdefault(name, []).append((_shape(inputs[0] if inputs else None), _shape(output)))

    return note


def _shape(value: object) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
