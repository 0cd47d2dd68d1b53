"""A program: a small network as text, the shapes that it is run with, and the options of its build.

Steps are templates, so that a program can be reduced without knowing its operators: `{x}`, `{x1}` … are a step's
sources, `{y}` its result, `{l}` its layer (an attribute of the network), `{m}` its mask (an input of the network),
`{c}` and `{s}` the channels and the shape of its first source.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]

PREAMBLE = '''\
import torch
import torch.nn.functional as F
from torch import nn


def settle(net, seed):
    """Weights and statistics as a trained network has them: none of them zero, one or alike."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda tensor: torch.randn(tensor.shape, generator=generator)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(getattr(layer, "running_var", None), torch.Tensor):
                layer.running_mean.copy_(draw(layer.running_mean) * 0.3)
                layer.running_var.copy_(draw(layer.running_var).abs() + 0.5)
            if "Norm" in type(layer).__name__ and getattr(layer, "weight", None) is not None:
                layer.weight.copy_(1 + 0.3 * draw(layer.weight))
                if getattr(layer, "bias", None) is not None:
                    layer.bias.copy_(0.3 * draw(layer.bias))
            if isinstance(layer, nn.PReLU):
                layer.weight.copy_(draw(layer.weight))
    return net.eval()


def drawn(shape, dtype, generator):
    """A random input: whole numbers are small, and below zero where their type has that."""
    x = torch.randn(shape, generator=generator)
    if dtype == torch.bool:
        return x > 0
    if dtype == torch.uint8:
        return (x.abs() * 3).to(dtype)
    return x.to(dtype) if dtype.is_floating_point else (x * 3).round().to(dtype)
'''


@dataclass
class Step:
    """One operator, or several that belong together: lines of the constructor and of forward."""

    name: str
    sources: list[int]
    body: list[str]
    init: list[str] = field(default_factory=list)
    mask: list[int] | None = None


@dataclass
class Program:
    """Values are numbered: inputs first, then the results of the steps."""

    seed: int
    inputs: list[list[int]]
    steps: list[Step] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: list[str] = field(default_factory=list)  # of the inputs; of those behind its end float32

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Program:
        fields = json.loads(text)
        return Program(**{**fields, "steps": [Step(**step) for step in fields["steps"]]})

    @property
    def digest(self) -> str:
        """What tells this program from others, whatever seed its weights come from."""
        told = json.dumps({**asdict(self), "seed": 0}, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass
class Network:
    """A program written out: its source text, the network, and the shapes of its inputs, masks among them."""

    source: str
    module: nn.Module
    shapes: dict[str, Shape]
    masks: set[str]
    dtypes: dict[str, torch.dtype]

    def batched(self, count: int | None) -> dict[str, Shape]:
        """The inputs' shapes with so many clips, where they have as many as the first input."""
        first = next(iter(self.shapes.values()))[:1]
        return {
            name: (count, *shape[1:]) if count is not None and shape[:1] == first else shape
            for name, shape in self.shapes.items()
        }


class Writer:
    """Writes a program out step by step, and runs each step to learn its result's shape."""

    def __init__(self, program: Program) -> None:
        self.seed = program.seed
        self.init: list[str] = []
        self.body: list[str] = []
        self.shapes: dict[str, Shape] = {f"x{i}": tuple(shape) for i, shape in enumerate(program.inputs)}
        self.masks: set[str] = set()
        self.open, self.special = "open" in program.options, "special" in program.options
        self.names = list(self.shapes)
        generator = torch.Generator().manual_seed(program.seed)
        self._holder = nn.Module()
        self._globals: dict[str, Any] = {}
        exec(PREAMBLE, self._globals)
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)
        self.dtypes |= {name: getattr(torch, dtype) for name, dtype in zip(self.names, program.dtypes, strict=False)}
        self.values: dict[str, Tensor] = {
            name: self._globals["drawn"](shape, self.dtypes[name], generator) for name, shape in self.shapes.items()
        }
        self._globals["self"] = self._holder
        for step in program.steps:
            self.add(step)

    def add(self, step: Step) -> Tensor:
        """The step's result. Raises what PyTorch raises where the step does not fit its sources."""
        name, number = f"v{len(self.names)}", len(self.names)
        for left in (f"l{number}", f"l{number}b"):  # of a step that did not fit
            if hasattr(self._holder, left):
                delattr(self._holder, left)
        first = self.values[self.names[step.sources[0]]]
        shape = tuple(first.shape)
        words: dict[str, Any] = {"y": name, "l": f"self.l{number}", "s": shape, "c": shape[min(1, len(shape) - 1)]}
        words.update({f"x{i or ''}": self.names[source] for i, source in enumerate(step.sources)})
        if step.mask is not None:
            words["m"] = f"m{number}"
            self.masks.add(words["m"])
            self.shapes[words["m"]] = tuple(step.mask)
            self.dtypes[words["m"]] = torch.float32
            self.values[words["m"]] = torch.randn(step.mask, generator=torch.Generator().manual_seed(number))
        init = [line.format(**words) for line in step.init]
        if self.open:
            words["s"] = f"{words['x']}.shape"
        body = [line.format(**words) for line in step.body]
        with torch.no_grad():
            torch.manual_seed(self.seed + number)
            exec("\n".join(init), self._globals)
            self._globals["settle"](self._holder, self.seed)
            scope = {**self._globals, **self.values}
            exec("\n".join(body), scope)
        self.values[name] = scope[name]
        self.init += [f"torch.manual_seed({self.seed + number})", *init] if init else []
        self.body += body
        self.names.append(name)
        return scope[name]

    def source(self, outputs: list[int]) -> str:
        """The network's class."""
        returned = ", ".join(self.names[index] for index in outputs)
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for text in self.init for line in text.splitlines()]
        lines += ["", f"    def forward(self, {', '.join(self.shapes)}):"]
        lines += [f"        {line}" for text in self.body for line in text.splitlines()]
        return "\n".join([*lines, f"        return {returned}", ""])


def write_out(program: Program) -> Network:
    """The network of ``program``. Raises what PyTorch raises where it makes no sense."""
    writer = Writer(program)
    source = f"{PREAMBLE}\n\n{writer.source(program.outputs)}"
    scope: dict[str, Any] = {"__name__": "program"}
    exec(source, scope)
    module = scope["settle"](scope["Net"](), program.seed)
    with torch.no_grad():
        module(*(writer.values[name] for name in writer.shapes))
    return Network(source, module, writer.shapes, writer.masks, writer.dtypes)
