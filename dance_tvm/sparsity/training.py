"""The training loop: data, task loss, schedule, mixed precision, several processes, curves, checkpoints, resuming.

What a pruning method adds to it is in ``method.py``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from dance_tvm.core.errors import DanceError
from dance_tvm.models.checkpoints import rename
from dance_tvm.sparsity import checkpoint
from dance_tvm.sparsity.batches import Indexed, ShuffledByEpoch
from dance_tvm.sparsity.clips import Batch, Clips, Splits
from dance_tvm.sparsity.method import Context, create_method
from dance_tvm.sparsity.optimization import make_optimizer, seed_everything, set_rate
from dance_tvm.sparsity.processes import fabric_of_run
from dance_tvm.sparsity.settings import Settings
from dance_tvm.sparsity.tasks import Classification, Task
from dance_tvm.sparsity.trained import require_same_run

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CHECKPOINT = "checkpoint.safetensors"


BEST = "best.safetensors"


MODEL = "model.safetensors"


CARD = "card.json"


CURVES = "curves.csv"


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

    A killed run continues from its last whole epoch with `resume=True`, and ends bit for bit as if it had not been
    killed (on one device and thread count). Under torchrun every process calls this; only rank 0 writes. `on_epoch`
    hears the figures of each epoch as it ends.
    Raises DanceError when the loss is not finite, the disk refuses a write, or the checkpoint is of another run.
    """
    with fabric_of_run(settings) as fabric:
        trainer = _Trainer(settings, network, splits, folder, task or Classification(), fabric, console)
        if resume:
            trainer.resume()
        try:
            return trainer.run(on_epoch if fabric.is_global_zero and on_epoch else lambda _row: None)
        finally:
            trainer.close()


#: What behaves otherwise in training than in use, and rests where a task imitates.
_RESTS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class _Steps:
    """Counts the steps of an epoch, and reports from time to time, where no bar can be drawn."""

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
        fabric: Fabric,
        console: Console | None,
    ) -> None:
        self._settings, self._splits, self._folder, self._task, self._fabric = settings, splits, folder, task, fabric
        self._console = console if console and fabric.is_global_zero else Console(quiet=True)
        self._device = fabric.device
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
        self._optimizer = make_optimizer(settings, list(self._method.parameters(self._network)))
        # The network computes in the run's precision through ``_parallel`` alone: held-out clips are judged in float32.
        self._parallel, self._stepper = fabric.setup(self._network, self._optimizer)
        self._precision = fabric.strategy.precision
        self._history: list[dict[str, float]] = []
        self._best: dict[str, float] | None = None

    # -- building --

    def _make_sampler(self) -> Any:
        if self._fabric.world_size == 1:
            return ShuffledByEpoch(len(self._splits.train), self._settings.seed)
        dataset = Indexed(self._splits.train)
        return DistributedSampler(dataset, shuffle=True, seed=self._settings.seed, drop_last=True)

    def _make_loader(self, clips: Clips, sampler: Any, drop_last: bool) -> DataLoader[Any]:
        settings = self._settings  # workers start anew with each epoch, so they see what set_epoch told the clips
        return DataLoader(
            Indexed(clips), settings.batch, sampler=sampler, drop_last=drop_last, num_workers=settings.workers
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

    def close(self) -> None:
        """Lets go of what adds up the gradients of all processes, before their group ends."""
        del self._parallel, self._stepper

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
        seed_everything(self._settings.seed, epoch, self._fabric.global_rank)
        self._sampler.set_epoch(epoch)
        if hasattr(self._splits.train, "set_epoch"):
            self._splits.train.set_epoch(epoch)
        self._parallel.train()
        self._method.epoch_started(self._network, epoch)
        for module in self._resting:
            module.eval()
        sums: dict[str, float] = {}
        for step, batch in enumerate(self._loader):
            set_rate(self._optimizer, self._settings, epoch * len(self._loader) + step, len(self._loader))
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
        with self._fabric.autocast():
            outputs = self._parallel(batch.clips)
            terms = {"task": self._task.loss(outputs, batch)} | self._method.losses(self._network, outputs, batch)
        values = {name: float(term.detach()) for name, term in terms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise DanceError(self._not_finite(name, value, epoch, step))
        if step == first:
            self._optimizer.zero_grad(set_to_none=True)
        self._fabric.backward(torch.stack([term.float() for term in terms.values()]).sum() / group)
        if step + 1 == first + group:
            most = self._settings.clip_norm
            self._fabric.clip_gradients(self._parallel, self._stepper, max_norm=most, error_if_nonfinite=False)
            self._stepper.step()
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
        clips, place = self._splits.held_out, self._fabric
        mine = list(range(place.global_rank, len(clips), place.world_size))
        loader = self._make_loader(clips, mine, drop_last=False)
        sums: dict[str, Tensor] = {}
        for batch in (Batch(*part).to(self._device) for part in loader):
            outputs = self._network(batch.clips)
            values = self._task.score(outputs, batch) | self._method.evaluate(self._network, outputs, batch)
            for name, value in values.items():
                sums[name] = (
                    sums.get(name, torch.zeros((), dtype=torch.float64, device=self._device)) + value.double().sum()
                )
        for name in sorted(sums) if place.world_size > 1 else ():
            sums[name] = cast(Tensor, place.all_reduce(sums[name], reduce_op="sum"))
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
        if not self._fabric.is_global_zero:
            return
        tensors = checkpoint.with_prefix("network", self._network.state_dict())
        tensors |= checkpoint.with_prefix("method", self._method.tensors(self._network))
        about = {"settings": self._settings.fingerprint(), "epoch": epoch, "history": self._history, "best": self._best}
        if better:
            checkpoint.write_checkpoint(self._folder / BEST, tensors, about)
        tensors |= checkpoint.with_prefix("optimizer", checkpoint.optimizer_tensors(self._optimizer))
        about["scaler"] = self._precision.state_dict()
        checkpoint.write_checkpoint(self._folder / CHECKPOINT, tensors, about)
        _write_curves(self._folder, self._history)

    def _standing(self, row: Mapping[str, float]) -> tuple[bool, float]:
        """What the best epoch has most of; until one is acceptable the latest counts, which has come furthest."""
        acceptable = self._method.acceptable(row)
        return acceptable, row[self._task.key if acceptable else "epoch"]

    def resume(self) -> None:
        path = self._folder / CHECKPOINT
        require_same_run(path, self._settings)
        tensors, about = checkpoint.read_checkpoint(path)
        checkpoint.load_weights(self._network, checkpoint.without_prefix("network", tensors), path)
        self._method.load_tensors(self._network, checkpoint.without_prefix("method", tensors))
        checkpoint.restore_optimizer(self._optimizer, checkpoint.without_prefix("optimizer", tensors))
        if about["scaler"]:
            self._precision.load_state_dict(about["scaler"])
        self._history, self._best = about["history"], about["best"]

    def _finish(self) -> Result:
        """Goes back to the best epoch and writes the inference network with its card."""
        self._fabric.barrier()
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
        if self._fabric.is_global_zero:
            checkpoint.write_checkpoint(
                self._folder / MODEL, checkpoint.with_prefix("network", network.state_dict()), card
            )
            checkpoint.write_atomically(self._folder / CARD, (json.dumps(card, indent=1) + "\n").encode())
        return Result(dict(self._best), self._history, card, self._folder, network)


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
