"""The training loop that every pruning method plugs into.

A *method* is one class that says what it adds to ordinary training. `python -m dance_tvm.train --method NAME` imports
it lazily by the name in `METHODS`. Everything else is the framework's: data, task loss, schedule, mixed precision,
several processes, curves, checkpoints and resuming.

    class Thinning(Method):                              # dance_tvm/sparsity/thinning/method.py, Thinning in METHODS
        name = "thinning"
        class Options(Method.Options):                   # the method's own settings, checked by pydantic
            rate: float = 2.0
        def prepare(self, network, context): ...         # once, before the optimizer: wrap, insert masks, freeze
        def parameters(self, network): ...               # what is trained (parameters or optimizer groups)
        def epoch_started(self, network, epoch): ...     # network.train() was just called
        def losses(self, network, outputs, batch): ...   # named terms, added to the task's loss
        def stepped(self, network): ...                  # after each optimizer step, e.g. put zeros back
        def evaluate(self, network, outputs, batch): ... # named values per held-out clip, e.g. MACs; averaged
        def epoch_ended(self, network, epoch, metrics):  # more figures for the curves
        def acceptable(self, metrics): ...               # may this epoch be the best one? (e.g. budget reached)
        def tensors(self, network) / load_tensors: ...   # own state in the checkpoint, beside the network's
        def finished(self, network): ...                 # the inference network to save and export
        def card(self, network): ...                     # what the card says about it, JSON

`losses` and `evaluate` see the network that `prepare` returned, never a DDP wrapper; values that the forward pass
leaves behind (MACs, activation statistics) may be kept in the network's attributes for them. A method must be
deterministic given `context.seed` and the batches, so that a resumed run equals an uninterrupted one bit for bit: all
random generators are seeded anew at each epoch from (seed, epoch, rank), nothing else is drawn from.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from dance_tvm.core.errors import DanceError
from dance_tvm.models.checkpoints import rename
from dance_tvm.sparsity import checkpoint
from dance_tvm.sparsity.data import Batch, Clips, Splits

CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"
MODEL = "model.safetensors"
CARD = "card.json"
CURVES = "curves.csv"

METHODS = {
    "dense": "dance_tvm.sparsity.training:Method",
    "ava": "dance_tvm.sparsity.dance.method:AVA",
    "aap": "dance_tvm.sparsity.dance.method:AAP",
    "kgs": "dance_tvm.sparsity.rt3d.method:KGS",
    "dstep": "dance_tvm.sparsity.dstep.method:DSTEP",
}


@dataclass(frozen=True)
class Context:
    """What a method may know when it prepares a network. `clip_shape` is (C, T, H, W)."""

    model: str
    clip_shape: tuple[int, int, int, int]
    classes: int
    epochs: int
    steps_per_epoch: int
    batch: int
    seed: int
    device: torch.device
    train: Clips
    task: Task


class Method:
    """Ordinary ("dense") training, and the base of every method: override what differs."""

    name: ClassVar[str] = "dense"

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **options: Any) -> None:
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "options"
            allowed = ", ".join(self.Options.model_fields) or "none"
            raise DanceError(f"--method {self.name}: {place}: {first['msg']}; its options: {allowed}") from error

    def prepare(self, network: nn.Module, context: Context) -> nn.Module:
        """The network to train: may wrap or change `network` in place. Called once, before weights are resumed."""
        return network

    def parameters(self, network: nn.Module) -> Iterable[Any]:
        """What the optimizer gets: parameters, or groups ({"params": …, "lr_scale": 10.0, "weight_decay": 0.0})."""
        return [parameter for parameter in network.parameters() if parameter.requires_grad]

    def epoch_started(self, network: nn.Module, epoch: int) -> None:
        """Called after `network.train()`, with epochs counted from 0."""

    def losses(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Scalar terms to add to the task's loss for this batch, by name (their weights already applied)."""
        return {}

    def stepped(self, network: nn.Module) -> None:
        """Called after each optimizer step."""

    def evaluate(self, network: nn.Module, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Values of each held-out clip (N,), by name; the framework averages them over the whole split."""
        return {}

    def epoch_ended(self, network: nn.Module, epoch: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Further figures for the curves, computed once an epoch, after evaluation."""
        return {}

    def acceptable(self, metrics: Mapping[str, float]) -> bool:
        """Whether an epoch with these metrics may become the best one."""
        return True

    def tensors(self, network: nn.Module) -> dict[str, Tensor]:
        """The method's own state beyond the network's `state_dict`, for the checkpoint."""
        return {}

    def load_tensors(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""

    def finished(self, network: nn.Module) -> nn.Module:
        """The inference network whose `state_dict` is saved as model.safetensors."""
        return network

    def card(self, network: nn.Module) -> dict[str, Any]:
        """What else card.json should say, JSON-serialisable: MACs, rates, decisions."""
        return {}


def create_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method called `name`. Raises DanceError for an unknown name, a missing method or a wrong option."""
    if name not in METHODS:
        raise DanceError(f"there is no method called {name!r}; choose one of {', '.join(METHODS)}")
    module_name, class_name = METHODS[name].split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DanceError(f"--method {name} needs the module {error.name}, which is not installed") from error
    method: Method = getattr(module, class_name)(**options)
    return method


# ---- tasks: what the labels mean -------------------------------------------------------------------------------


class Task(Protocol):
    """What the outputs are compared with: `loss` a scalar, `score` values of each clip (N,); larger `key` is better.

    Where it `imitates`, the network trains as it is used: without dropout, with the batch norm it came with.
    `probe` is a random mixture of the outputs, each as important as to the loss: the mean square of its gradient says
    how much the outputs change.
    """

    key: str
    imitates: bool

    def loss(self, outputs: Any, batch: Batch) -> Tensor: ...

    def score(self, outputs: Any, batch: Batch) -> dict[str, Tensor]: ...

    def probe(self, outputs: Any) -> Tensor: ...


class Classification:
    """One label a clip; cross-entropy, accuracy 0 to 1."""

    key = "accuracy"
    imitates = False

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(outputs, batch.labels)

    def score(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {
            "accuracy": (outputs.argmax(1) == batch.labels).float(),
            "task": functional.cross_entropy(outputs, batch.labels, reduction="none"),
        }

    def probe(self, outputs: Tensor) -> Tensor:
        return (torch.randn_like(outputs) * outputs).sum()


class Logits(nn.Module):
    """A network whose forward pass ends before its sigmoid: calls `logits` where the network has it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> Any:
        if hasattr(self.network, "logits"):
            return self.network.logits(clips)  # type: ignore[operator]  # a Module's attributes are untyped
        return self.network(clips)


def sequences_of_logits(outputs: Any) -> list[Tensor]:
    """A network's outputs (one tensor, a tuple, or TransNetV2's nested dictionary) as a flat list of tensors."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = [outputs[key] for key in sorted(outputs)]
    return [tensor for part in outputs for tensor in sequences_of_logits(part)]


class Distillation:
    """No labels: the dense network's logits on the same clip are the truth (binary per entry, as TransNetV2's).

    Entries weigh by what the teacher says: those of boundaries together as much as all others together, however few
    they are. Where the network says the same as its teacher there is no loss, so dropout, which would make one, is off;
    and batch norm rests, because a batch is a window or two of one film.
    `agreement` is the share of entries on the same side of probability 0.5 and `difference` the largest difference
    of probability in the clip, both on the first output. `hits`, `extra` and `missed` count boundary frames for F1.
    What the teacher said of a clip is remembered; `varying` training clips, which differ by epoch, are asked anew.
    """

    key = "likeness"
    imitates = True

    def __init__(self, teacher: nn.Module, *, varying: bool = False) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._varying = varying
        self._said: dict[tuple[str, int], list[Tensor]] = {}

    def _truth(self, batch: Batch, split: str) -> list[Tensor]:
        """The teacher's logits, sequence by sequence, (N, …)."""
        keys = [(split, index) for index in batch.index.tolist()]
        if not all(key in self._said for key in keys) or (self._varying and split == "train"):
            with torch.no_grad():
                said = sequences_of_logits(self._teacher.to(batch.clips.device)(batch.clips))
            self._said |= {key: [tensor[place] for tensor in said] for place, key in enumerate(keys)}
        return [torch.stack(tensors) for tensors in zip(*(self._said[key] for key in keys), strict=True)]

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        truth = self._truth(batch, "train")
        ours = sequences_of_logits(outputs)
        return torch.stack([_balanced(mine.float(), true) for mine, true in zip(ours, truth, strict=True)]).sum()

    def score(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        mine = sequences_of_logits(outputs)[0].float().flatten(1).sigmoid()
        true = self._truth(batch, "held out")[0].flatten(1).sigmoid()
        found, real = mine > 0.5, true > 0.5
        return {
            "difference": (mine - true).abs().amax(1),
            "agreement": (found == real).float().mean(1),
            "likeness": 1 - (mine - true).abs().mean(1),
            "hits": (found & real).float().sum(1),
            "extra": (found & ~real).float().sum(1),
            "missed": (~found & real).float().sum(1),
        }

    def probe(self, outputs: Any) -> Tensor:
        sequences = [tensor.float() for tensor in sequences_of_logits(outputs)]
        weights = (_weights(tensor.detach().sigmoid()) for tensor in sequences)
        return torch.stack(
            [
                (torch.randn_like(tensor) * weight.sqrt() * tensor).sum()
                for tensor, weight in zip(sequences, weights, strict=True)
            ]
        ).sum()


def _balanced(ours: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || ours) of binary entries, two logits of one shape; see `Distillation` for their weights."""
    said = teacher.sigmoid()
    distance = functional.binary_cross_entropy_with_logits(ours, said, reduction="none")
    return (
        _weights(said) * (distance - functional.binary_cross_entropy_with_logits(teacher, said, reduction="none"))
    ).sum()


def _weights(said: Tensor) -> Tensor:
    """Weights of entries by the probabilities `said` of them: those of boundaries sum to one, as those of the rest."""
    return said / said.sum().clamp(min=1) + (1 - said) / (1 - said).sum().clamp(min=1)


# ---- settings and run ------------------------------------------------------------------------------------------


class Settings(BaseModel):
    """What one run is. `fingerprint` is the part that a resumed run must share with its checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    model: str
    data: str
    options: dict[str, Any] = {}
    epochs: int = 10
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: str = "adam"
    warmup: float = 0.05
    clip_norm: float = 5.0
    seed: int = 0
    amp: bool = True
    precision: str = "float16"
    accumulate: int = 1
    workers: int = 0
    init: str | None = None

    def fingerprint(self) -> dict[str, Any]:
        same = {
            "precision",
            "accumulate",
            "method",
            "model",
            "data",
            "options",
            "epochs",
            "batch",
            "lr",
            "weight_decay",
            "optimizer",
            "seed",
            "init",
        }
        return json.loads(json.dumps(self.model_dump(include=same)))


@dataclass
class Result:
    """How a run ended: the best epoch's metrics, every epoch's, and the files written."""

    metrics: dict[str, float]
    history: list[dict[str, float]]
    card: dict[str, Any]
    folder: Path
    network: nn.Module = field(repr=False)


def train(
    settings: Settings,
    network: nn.Module,
    splits: Splits,
    folder: Path,
    *,
    resume: bool = False,
    task: Task | None = None,
    console: Console | None = None,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
) -> Result:
    """Trains `network` by `settings.method` and writes checkpoint, curves, model and card into `folder`.

    A killed run goes on from its last whole epoch with `resume=True`, and ends bit for bit as if it had not been
    killed (on one device and thread count). Under torchrun every process calls this; rank 0 alone writes. `on_epoch`
    hears the figures of each epoch as it ends.
    Raises DanceError when the loss is not finite, the disk refuses a write, or the checkpoint is of another run.
    """
    with _processes() as processes:
        trainer = _Trainer(settings, network, splits, folder, task or Classification(), processes, console)
        if resume:
            trainer.resume()
        return trainer.run(on_epoch if processes.leader and on_epoch else lambda _row: None)


@dataclass(frozen=True)
class _Processes:
    rank: int
    count: int
    device: torch.device

    @property
    def leader(self) -> bool:
        return self.rank == 0


@contextmanager
def _processes() -> Iterator[_Processes]:
    """This process's place among torchrun's, its device, and the process group while it is needed."""
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if count == 1:
        yield _Processes(0, 1, device)
        return
    distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        yield _Processes(distributed.get_rank(), count, device)
    finally:
        distributed.destroy_process_group()


class _ShuffledByEpoch(Sampler[int]):
    """A permutation that (seed, epoch) settles."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed, self._epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._count)
        return iter(order.tolist())


class _Indexed(torch.utils.data.Dataset[tuple[Tensor, Any, int]]):
    """Clips with their index, so that a batch knows which clips it holds."""

    def __init__(self, clips: Clips) -> None:
        self._clips = clips

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, int]:
        clip, label = self._clips[index]
        return clip, label, index


#: What tells training from use, and rests where a task imitates.
_RESTS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class _Steps:
    """Counts the steps of an epoch, and tells from time to time, where no bar can be drawn."""

    EVERY_S = 30.0

    def __init__(self, console: Console, name: str, steps: int) -> None:
        self._console, self._name, self._steps = console, name, steps
        self._done, self._told = 0, time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        if time.monotonic() - self._told > self.EVERY_S:
            self._told = time.monotonic()
            self._console.print(f"{self._name}  {self._done} of {self._steps} steps", soft_wrap=True)


class _Trainer:
    def __init__(
        self,
        settings: Settings,
        network: nn.Module,
        splits: Splits,
        folder: Path,
        task: Task,
        processes: _Processes,
        console: Console | None,
    ) -> None:
        self._settings, self._splits, self._folder, self._task, self._processes = (
            settings,
            splits,
            folder,
            task,
            processes,
        )
        self._console = console if console and processes.leader else Console(quiet=True)
        self._device = processes.device
        seed_everything(settings.seed)
        self._sampler = self._make_sampler()
        self._loader = self._make_loader(splits.train, self._sampler, drop_last=len(splits.train) > settings.batch)
        self._method = create_method(settings.method, settings.options)
        self._resting = [module for module in network.modules() if isinstance(module, _RESTS)] if task.imitates else []
        weights = rename(network, checkpoint.read_weights(Path(settings.init))) if settings.init else {}
        if weights:
            self._console.print(checkpoint.matched(network, weights, str(settings.init)), soft_wrap=True)
            weights = checkpoint.fitting(network, weights)
            checkpoint.load_weights(network, weights, str(settings.init), partial=True)
        self._network = self._method.prepare(network, self._context()).to(self._device)
        if weights.keys() & (self._network.state_dict().keys() - network.state_dict().keys()):
            checkpoint.load_weights(self._network, weights, str(settings.init), partial=True)  # the method's own, too
        self._parallel = self._wrap(self._network)
        self._optimizer = _make_optimizer(settings, list(self._method.parameters(self._network)))
        self._half = _half(settings, self._device)
        self._scaler = torch.amp.GradScaler(enabled=self._half is torch.float16)
        self._history: list[dict[str, float]] = []
        self._best: dict[str, float] | None = None

    # -- building --

    def _make_sampler(self) -> Any:
        if self._processes.count == 1:
            return _ShuffledByEpoch(len(self._splits.train), self._settings.seed)
        dataset = _Indexed(self._splits.train)
        return DistributedSampler(dataset, shuffle=True, seed=self._settings.seed, drop_last=True)

    def _make_loader(self, clips: Clips, sampler: Any, drop_last: bool) -> DataLoader[Any]:
        settings = self._settings  # workers start anew with each epoch, so they see what set_epoch told the clips
        return DataLoader(
            _Indexed(clips), settings.batch, sampler=sampler, drop_last=drop_last, num_workers=settings.workers
        )

    def _context(self) -> Context:
        settings, train = self._settings, self._splits.train
        return Context(
            model=settings.model,
            clip_shape=train.shape,
            classes=len(train.classes),
            epochs=settings.epochs,
            steps_per_epoch=len(self._loader),
            batch=settings.batch,
            seed=settings.seed,
            device=self._device,
            train=train,
            task=self._task,
        )

    def _wrap(self, network: nn.Module) -> nn.Module:
        if self._processes.count == 1:
            return network
        ids = [self._device.index] if self._device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, find_unused_parameters=True)

    # -- the loop --

    def run(self, on_epoch: Callable[[dict[str, float]], object]) -> Result:
        epochs = self._settings.epochs
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        watched = self._console.is_terminal
        with Progress(*columns, console=self._console, disable=not watched) as progress:
            for epoch in range(len(self._history), epochs):
                name = f"epoch {epoch + 1}/{epochs}"
                bar = progress.add_task(name, total=len(self._loader))
                advance = partial(progress.advance, bar) if watched else _Steps(self._console, name, len(self._loader))
                row = self._epoch(epoch, advance)
                self._keep(epoch, row)
                if watched:
                    progress.update(bar, description=f"{name}  {_told(row)}")
                else:
                    self._console.print(f"{name}  {_told(row)}  {row['seconds']:.0f} s", soft_wrap=True)
                on_epoch(row)
        return self._finish()

    def _epoch(self, epoch: int, advance: Callable[[], Any]) -> dict[str, float]:
        started = time.perf_counter()
        seed_everything(self._settings.seed, epoch, self._processes.rank)
        self._sampler.set_epoch(epoch)
        if hasattr(self._splits.train, "set_epoch"):
            self._splits.train.set_epoch(epoch)
        self._parallel.train()
        self._method.epoch_started(self._network, epoch)
        for module in self._resting:
            module.eval()
        sums: dict[str, float] = {}
        for step, batch in enumerate(self._loader):
            _set_rate(self._optimizer, self._settings, epoch * len(self._loader) + step, len(self._loader))
            terms = self._step(Batch(*batch).to(self._device), epoch, step)
            for name, value in terms.items():
                sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0.0) + value
            advance()
        row = {"epoch": float(epoch), **{name: value / len(self._loader) for name, value in sums.items()}}
        row |= self.evaluate()
        row |= self._method.epoch_ended(self._network, epoch, row)
        return row | {"seconds": time.perf_counter() - started}

    def _step(self, batch: Batch, epoch: int, step: int) -> dict[str, float]:
        """One batch; the optimizer steps where a group of `accumulate` of them, or the epoch, ends."""
        first = step - step % self._settings.accumulate
        group = min(self._settings.accumulate, len(self._loader) - first)
        half = torch.autocast(self._device.type, self._half) if self._half else nullcontext()
        with half:
            outputs = self._parallel(batch.clips)
            terms = {"task": self._task.loss(outputs, batch)} | self._method.losses(self._network, outputs, batch)
        values = {name: float(term.detach()) for name, term in terms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise DanceError(self._not_finite(name, value, epoch, step))
        if step == first:
            self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(torch.stack([term.float() for term in terms.values()]).sum() / group).backward()
        if step + 1 < first + group:
            return values
        self._scaler.unscale_(self._optimizer)
        trained = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, self._settings.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._method.stepped(self._network)
        return values

    def _not_finite(self, term: str, value: float, epoch: int, step: int) -> str:
        kept = self._folder / CHECKPOINT
        where = f"; the last good checkpoint, {kept}, is intact" if kept.exists() else ""
        when = f"epoch {epoch + 1}, step {step + 1}"
        return f"the {term} loss became {value} at {when}: lower --lr or check the clips{where}"

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean of the task's and the method's values over the held-out clips, the same in every process."""
        self._network.eval()
        clips, place = self._splits.held_out, self._processes
        mine = list(range(place.rank, len(clips), place.count))
        loader = self._make_loader(clips, mine, drop_last=False)
        sums: dict[str, Tensor] = {}
        for batch in (Batch(*part).to(self._device) for part in loader):
            outputs = self._network(batch.clips)
            values = self._task.score(outputs, batch) | self._method.evaluate(self._network, outputs, batch)
            for name, value in values.items():
                sums[name] = (
                    sums.get(name, torch.zeros((), dtype=torch.float64, device=self._device)) + value.double().sum()
                )
        if place.count > 1:
            for name in sorted(sums):
                distributed.all_reduce(sums[name])
        metrics = {name: float(total) / len(clips) for name, total in sums.items()}
        if {"hits", "extra", "missed"} <= metrics.keys():
            hits, extra, missed = (metrics.pop(name) for name in ("hits", "extra", "missed"))
            metrics["f1"] = 2 * hits / (2 * hits + extra + missed) if hits + extra + missed else 1.0
        return metrics

    # -- files --

    def _keep(self, epoch: int, row: dict[str, float]) -> None:
        self._history.append(row)
        better = self._best is None or self._standing(row) >= self._standing(self._best)
        if better:
            self._best = row
        if not self._processes.leader:
            return
        tensors = checkpoint.with_prefix("network", self._network.state_dict())
        tensors |= checkpoint.with_prefix("method", self._method.tensors(self._network))
        about = {"settings": self._settings.fingerprint(), "epoch": epoch, "history": self._history, "best": self._best}
        if better:
            checkpoint.write_checkpoint(self._folder / BEST, tensors, about)
        tensors |= checkpoint.with_prefix("optimizer", checkpoint.optimizer_tensors(self._optimizer))
        about["scaler"] = self._scaler.state_dict()
        checkpoint.write_checkpoint(self._folder / CHECKPOINT, tensors, about)
        _write_curves(self._folder, self._history)

    def _standing(self, row: Mapping[str, float]) -> tuple[bool, float]:
        """What the best epoch has most of; until one is acceptable the latest counts, which has come furthest."""
        acceptable = self._method.acceptable(row)
        return acceptable, row[self._task.key if acceptable else "epoch"]

    def resume(self) -> None:
        path = self._folder / CHECKPOINT
        tensors, about = checkpoint.read_checkpoint(path)
        ours, theirs = self._settings.fingerprint(), about["settings"]
        defaults = Settings.model_fields  # of what a checkpoint says nothing, written before there was a choice
        theirs = {name: theirs.get(name, defaults[name].default) for name in ours}
        differing = [name for name in ours if ours[name] != theirs[name]]
        if differing:
            name = differing[0]
            raise DanceError(
                f"{path} belongs to another run: its {name} is {theirs.get(name)!r}, not {ours[name]!r}; "
                "repeat its settings or train into another folder"
            )
        checkpoint.load_weights(self._network, checkpoint.without_prefix("network", tensors), path)
        self._method.load_tensors(self._network, checkpoint.without_prefix("method", tensors))
        checkpoint.restore_optimizer(self._optimizer, checkpoint.without_prefix("optimizer", tensors))
        if about["scaler"]:
            self._scaler.load_state_dict(about["scaler"])
        self._history, self._best = about["history"], about["best"]

    def _finish(self) -> Result:
        """Goes back to the best epoch and writes the inference network with its card."""
        if self._processes.count > 1:
            distributed.barrier()
        tensors, _ = checkpoint.read_checkpoint(self._folder / BEST)
        checkpoint.load_weights(self._network, checkpoint.without_prefix("network", tensors), self._folder / BEST)
        self._method.load_tensors(self._network, checkpoint.without_prefix("method", tensors))
        self._network.eval()
        assert self._best is not None
        card = {
            "settings": self._settings.fingerprint(),
            "data": {
                "name": self._splits.name,
                "clips": len(self._splits.train),
                "held_out": len(self._splits.held_out),
            },
            "metrics": self._best,
            "classes": list(self._splits.train.classes),
            "clip_shape": list(self._splits.train.shape),
            "clip_dtype": str(self._splits.train[0][0].dtype).removeprefix("torch."),
            **self._method.card(self._network),
        }
        network = self._method.finished(self._network)
        if self._processes.leader:
            checkpoint.write_checkpoint(
                self._folder / MODEL, checkpoint.with_prefix("network", network.state_dict()), card
            )
            checkpoint.write_atomically(self._folder / CARD, (json.dumps(card, indent=1) + "\n").encode())
        return Result(dict(self._best), self._history, card, self._folder, network)


def seed_everything(*parts: int) -> None:
    """Seeds torch, numpy and every device from (seed, epoch, rank …)."""
    seed = int(np.random.SeedSequence(list(parts)).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)


def _half(settings: Settings, device: torch.device) -> torch.dtype | None:
    """What forward passes compute in where that is not float32: float16 on GPUs alone, bfloat16 anywhere."""
    if not settings.amp or settings.precision == "float32":
        return None
    if settings.precision not in ("float16", "bfloat16"):
        raise DanceError(f"there is no precision called {settings.precision!r}; choose float32, float16 or bfloat16")
    if settings.precision == "float16" and device.type != "cuda":
        return None
    return getattr(torch, settings.precision)


def _make_optimizer(settings: Settings, parameters: list[Any]) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
    raise DanceError(f"there is no optimizer called {settings.optimizer!r}; choose adam or sgd")


def _set_rate(optimizer: torch.optim.Optimizer, settings: Settings, step: int, steps_per_epoch: int) -> None:
    """Linear warm-up, then a cosine to zero; a function of the step alone, so that nothing needs to be resumed."""
    total = max(1, settings.epochs * steps_per_epoch)
    warm = max(1.0, settings.warmup * total)
    factor = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / total))
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * factor * group.get("lr_scale", 1.0)


def _told(row: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ("epoch", "seconds"))


def _write_curves(folder: Path, history: list[dict[str, float]]) -> None:
    """All epochs to curves.csv, the newest to TensorBoard where it is installed."""
    names = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(history)
    checkpoint.write_atomically(folder / CURVES, text.getvalue().encode())
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    epoch = int(history[-1]["epoch"])
    with SummaryWriter(str(folder / "tensorboard"), purge_step=epoch) as board:
        for name, value in history[-1].items():
            board.add_scalar(name, value, epoch)
