"""The training loop: resuming after a kill, bad input, a full disk, several processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity import checkpoint, method, training
from dance_tvm.sparsity.clips import Splits
from dance_tvm.sparsity.settings import Settings
from dance_tvm.train import app, run

SMALL = "motion-digits,train=48,test=16,size=24,frames=8"


class Squares:
    """Clips of two classes, bright and dark, that spoil themselves from a chosen epoch on."""

    classes: tuple[str, ...] = ("dark", "bright")
    shape: tuple[int, int, int, int] = (1, 4, 6, 6)

    def __init__(self, count: int, spoilt_from: int = 99) -> None:
        self._count, self._spoilt_from, self._epoch = count, spoilt_from, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        clip = torch.rand(self.shape, generator=generator) + index % 2
        return clip * (float("nan") if self._epoch >= self._spoilt_from else 1), index % 2


class Plain(nn.Module):
    """One convolution and one linear layer: no batch norm, so gradients of two halves average to those of the whole."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, channels, 3, padding=1)
        self.fc = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(torch.relu(self.conv(x)).mean((2, 3, 4)))
        return scores


def settings(**changes: object) -> Settings:
    return Settings(**({"method": "dense", "model": "plain", "data": "squares", "epochs": 3, "batch": 16} | changes))


def splits(**changes: int) -> Splits:
    return Splits("squares", Squares(16, **changes), Squares(8))


def command(out: Path, *more: str, data: str = SMALL) -> list[str]:
    return [
        sys.executable, "-m", "dance_tvm.train", "--method", "dense", "--data", data, "--batch", "16",
        "--epochs", "3", "--threads", "1", "--no-export", "--json", "--out", str(out), *more,
    ]  # fmt: skip


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = run(method="dense", model="c3d-mini", data=SMALL, out=tmp_path / "whole", epochs=3, batch=16, threads=1)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / training.CHECKPOINT).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not (killed / training.MODEL).exists(), "the run ended before it was killed"

    resumed = run(
        method="dense", model="c3d-mini", data=SMALL, out=killed, epochs=3, batch=16, threads=1, resume=True
    )  # fmt: skip

    assert len(resumed.history) == 3
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    drop_time = [{**row, "seconds": 0} for row in whole.history]
    assert drop_time == [{**row, "seconds": 0} for row in resumed.history]
    assert (killed / training.CURVES).read_text().count("\n") == 4

    longer = ["--resume", "--out", str(killed), "--epochs", "4", "--threads", "1", "--no-export", "--json"]
    card = json.loads(CliRunner().invoke(app, longer, catch_exceptions=False).stdout)
    assert card["settings"] == {**whole.card["settings"], "epochs": 4}
    assert (killed / training.CURVES).read_text().count("\n") == 5


def test_curves_card_and_model_are_written(tmp_path: Path) -> None:
    result = training.train(settings(), Plain(), splits(), tmp_path)
    assert result.metrics["accuracy"] == max(row["accuracy"] for row in result.history)
    card = json.loads((tmp_path / training.CARD).read_text())
    assert card["classes"] == ["dark", "bright"]
    assert card["settings"]["epochs"] == 3
    header = (tmp_path / training.CURVES).read_text().splitlines()[0]
    assert {"epoch", "loss/task", "accuracy"} <= set(header.split(","))
    assert list((tmp_path / "tensorboard").iterdir())
    weights = checkpoint.read_weights(tmp_path / training.MODEL)
    assert torch.equal(weights["fc.weight"], result.network.state_dict()["fc.weight"])


@pytest.mark.parametrize(("budget", "kept"), [(3.0, 1), (0.0, 3)], ids=["in time", "never"])
def test_the_best_epoch_is_within_the_budget_or_the_last(
    budget: float, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Thinning(method.Method):
        """Reaches a share of 4, 2, 1, 0.5 of the work and loses accuracy with each epoch."""

        def epoch_ended(self, network: nn.Module, epoch: int, metrics: object) -> dict[str, float]:
            return {"share": (4.0, 2.0, 1.0, 0.5)[epoch], "accuracy": 1 - epoch / 4}

        def acceptable(self, metrics: Mapping[str, float]) -> bool:
            return metrics["share"] < budget

    monkeypatch.setattr(training, "create_method", lambda name, options: Thinning())
    result = training.train(settings(epochs=4), Plain(), splits(), tmp_path)
    assert result.metrics["epoch"] == kept


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DanceError, match=r"task loss became nan at epoch 2, step 1: .*is intact"):
        training.train(settings(), Plain(), splits(spoilt_from=1), tmp_path)
    _, about = checkpoint.read_checkpoint(tmp_path / training.CHECKPOINT)
    assert about["epoch"] == 0


def test_a_full_disk_is_told_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.write_checkpoint(path, {"a": torch.ones(8)}, {"epoch": 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1 << 20, limits[1])
    )  # files may not grow past 1 MiB: EFBIG, as on a quota
    try:
        with pytest.raises(DanceError, match=r"could not write .*the last good checkpoint\.safetensors is intact"):
            checkpoint.write_checkpoint(path, {"a": torch.ones(1 << 20)}, {"epoch": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tensors, about = checkpoint.read_checkpoint(path)
    assert about == {"epoch": 0}
    assert tensors["a"].shape == (8,)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    training.train(settings(epochs=1), Plain(), splits(), tmp_path)
    with pytest.raises(DanceError, match=r"belongs to another run: its lr is 0\.001, not 0\.5"):
        training.train(settings(epochs=1, lr=0.5), Plain(), splits(), tmp_path, resume=True)
    with pytest.raises(DanceError, match=r"belongs to another network: conv\.bias has shape \(4,\) there"):
        training.train(settings(epochs=1), Plain(channels=5), splits(), tmp_path, resume=True)
    weights = tmp_path / training.MODEL
    with pytest.raises(DanceError, match="belongs to another network"):
        training.train(settings(epochs=1, init=str(weights)), nn.Sequential(nn.Linear(2, 2)), splits(), tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b'\x08\x00\x00\x00\x00\x00\x00\x00{"a": 1}'])
def test_a_torn_or_foreign_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / training.CHECKPOINT
    path.write_bytes(content)
    with pytest.raises(DanceError, match="not a"):
        training.train(settings(), Plain(), splits(), tmp_path, resume=True)


def test_resuming_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DanceError, match="is missing: name a folder that a training run has written to"):
        training.train(settings(), Plain(), splits(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "cats"], "there are no clips called 'cats'"),
        (["--data", "motion-digits,colour=3"], "not colour"),
        (["--method", "aap", "--target-macs", "-1"], "must be a number above 0, not -1.0"),
        (["--method", "ava", "--target-macs", "0.5"], "target_macs: there is no such option; its options: "),
        (["--set", "nonsense"], "not of the form NAME=VALUE"),
        (["--model", "c3d-minni"], "did you mean 'c3d-mini'"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    usual = {"--method": "dense", "--data": SMALL, "--epochs": "1", "--out": str(tmp_path)}
    rest = [word for option, value in usual.items() if option not in arguments for word in (option, value)]
    error = CliRunner().invoke(app, [*rest, *arguments]).exception
    assert isinstance(error, DanceError)
    assert sentence in str(error)


def test_the_command_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, data="ucf101:/nowhere"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data ucf101:/nowhere: there is no folder /nowhere")
    assert "Traceback" not in done.stderr


#: As the last owner of the processes' group, what adds up gradients may keep a process from ever ending.
_TWO = """
import gc
import sys
from pathlib import Path
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
ends = distributed.destroy_process_group
def checked():
    assert not [each for each in gc.get_objects() if isinstance(each, DistributedDataParallel)]
    ends()
distributed.destroy_process_group = checked
sys.path.insert(0, {tests!r})
from test_training import Plain, Splits, Squares, settings
from dance_tvm.sparsity import training
training.train(settings(batch=8, epochs=3), Plain(), Splits("squares", Squares(16), Squares(8)), Path({out!r}))
"""


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    alone = training.train(settings(batch=16), Plain(), splits(), tmp_path / "alone")
    script = tmp_path / "two.py"
    script.write_text(_TWO.format(tests=str(Path(__file__).parent), out=str(tmp_path / "two")))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tensors, about = checkpoint.read_checkpoint(tmp_path / "two" / training.CHECKPOINT)
    for name, tensor in checkpoint.without_prefix("network", tensors).items():
        torch.testing.assert_close(tensor, alone.network.state_dict()[name], rtol=1e-4, atol=1e-6)
    for together, single in zip(about["history"], alone.history, strict=True):
        assert together["task"] == pytest.approx(single["task"], rel=1e-4)


def test_gradients_of_small_batches_add_up_to_those_of_one(tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((16, 1), (4, 4)):
        network = Plain()
        chosen = settings(epochs=1, optimizer="sgd", batch=batch, accumulate=accumulate, warmup=0.0, lr=0.1)
        training.train(chosen, network, splits(), tmp_path / str(batch))
        found.append(network.state_dict())
    assert not torch.equal(found[0]["fc.weight"], Plain().state_dict()["fc.weight"])
    rates = [1.0, 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 3 / 4)))]  # the step of four batches is the fourth's
    for name, start in Plain().state_dict().items():
        once, four = (each[name] - start for each in found)
        torch.testing.assert_close(four, once * rates[1] / rates[0], rtol=1e-2, atol=1e-5)


def test_bfloat16_trains_on_a_processor_and_float32_is_what_it_was(tmp_path: Path) -> None:
    weights = {}
    for precision in ("float16", "float32", "bfloat16"):
        network = Plain()
        chosen = settings(epochs=2, precision=precision, optimizer="sgd", lr=0.1)
        training.train(chosen, network, splits(), tmp_path / precision)
        weights[precision] = network.state_dict()["fc.weight"]
    assert torch.equal(weights["float16"], weights["float32"])  # float16 is for GPUs
    assert not torch.equal(weights["bfloat16"], weights["float32"])
    torch.testing.assert_close(weights["bfloat16"], weights["float32"], rtol=0.05, atol=0.02)
    with pytest.raises(DanceError, match="there is no precision called"):
        training.train(settings(precision="int4"), Plain(), splits(), tmp_path)


def test_workers_decode_the_same_clips(tmp_path: Path) -> None:
    results = [
        training.train(settings(epochs=2, workers=count), Plain(), splits(), tmp_path / str(count)) for count in (0, 2)
    ]
    alike = [{name: value for name, value in each.metrics.items() if name != "seconds"} for each in results]
    assert alike[0] == alike[1]


class Deeper(Plain):
    """Two convolutions, so that the last layer is the smaller part."""

    def __init__(self) -> None:
        super().__init__()
        head = self.fc
        del self.fc
        self.second = nn.Conv3d(4, 4, 1)
        self.fc = head

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.second(torch.relu(self.conv(x))).mean((2, 3, 4)))
        return scores


def test_first_weights_of_a_state_dict_are_told_by_name(tmp_path: Path) -> None:
    state = {f"module.{name}": value + 1 for name, value in Deeper().state_dict().items()}
    state["module.fc.weight"], state["module.fc.bias"] = torch.ones(9, 4), torch.ones(9)
    state["module.extra"] = torch.ones(1)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    given = checkpoint.read_weights(tmp_path / "w.pth")
    told = checkpoint.matched(Deeper(), {name.removeprefix("module."): value for name, value in given.items()}, "w.pth")
    assert told == (
        "w.pth gives 4 of 6 tensors; of another shape, and not taken: fc.weight, fc.bias; of no use here: extra"
    )
    network = Deeper()
    training.train(settings(epochs=1, lr=0.0, init=str(tmp_path / "w.pth")), network, splits(), tmp_path / "out")
    assert torch.equal(network.conv.bias, Deeper().conv.bias + 1)
    assert torch.equal(network.fc.bias, Deeper().fc.bias)
    torch.save(Plain(), tmp_path / "whole.pth")
    with pytest.raises(DanceError, match="holds no plain state dict"):
        checkpoint.read_weights(tmp_path / "whole.pth")


def test_every_setting_is_printed_before_anything_is_trained(tmp_path: Path) -> None:
    words = ["--method", "aap", "--target-macs", "50%", "--precision", "bfloat16", "--print-config"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    told = json.loads(done.output)
    assert (told["precision"], told["accumulate"], told["method"]) == ("bfloat16", 1, "aap")
    assert len(told["options"]) > 1
    assert not (tmp_path / "out").exists()
