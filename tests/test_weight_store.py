"""Weights are stored once, and what a model prepares from them is what the compiler packed, to the bit."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tvm import relax

from dance_tvm import DanceError, Options, build_network, import_model
from dance_tvm.artifact.arena import Storage
from dance_tvm.artifact.c_program import Program, program_of
from dance_tvm.artifact.folder import Manifest
from dance_tvm.artifact.interface import dance_model
from dance_tvm.artifact.interface.dance_model import Model
from dance_tvm.artifact.weight_store import CHUNK, PAGE, Store, store_of
from dance_tvm.compiler.build import new_manifest
from dance_tvm.compiler.code import compile_lowered
from dance_tvm.compiler.pipeline import lower
from dance_tvm.compiler.program import write_program
from dance_tvm.lowering.share_memory import BALANCED_GROWTH, LARGE, MOST_GROWTH, SMALL_BYTES, spend
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.preparation import array_digest


class Various(nn.Module):
    """Layers whose weights are packed in every way: panels with a rest, groups, Winograd along one, two and three axes,
    weights with many zeros in no pattern, and two layers that are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 20, 3, padding=1)
        self.spatial = nn.Conv3d(20, 36, (1, 3, 3), padding=(0, 1, 1))
        self.frames = nn.Conv3d(36, 36, (3, 1, 1), padding=(1, 0, 0))
        self.grouped = nn.Conv3d(36, 40, (1, 2, 2), groups=2)
        self.zeros = nn.Conv3d(40, 24, (2, 2, 2))
        self.twice = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.frames(torch.relu(self.spatial(torch.relu(self.first(x))))))
        y = torch.relu(self.zeros(torch.relu(self.grouped(y)))).mean((2, 3, 4))
        return self.twice(torch.relu(self.twice(y)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    network = Various().eval()
    network.zeros.weight.data[torch.rand_like(network.zeros.weight) < 0.7] = 0
    return network


@pytest.mark.parametrize(("conv", "most_inline"), [("winograd", 1 << 20), ("direct", 0)])
def test_what_kernels_read_is_what_was_packed(network, conv, most_inline, tmp_path):
    x = torch.randn(1, 3, 5, 11, 12)
    target, options = load_target("host"), Options(threads=2, conv=conv, sparsity="off")
    imported = import_model(network, example_inputs=(x,))
    lowered = lower(imported.mod, target, options)
    code = compile_lowered(lowered, target, options, tmp_path)
    manifest: Manifest = new_manifest(imported, target, options)
    write_program(tmp_path / "a", lowered, code, manifest, target, options, most_inline=most_inline)
    program = program_of(code.planned, list(lowered.weights.values()))
    packed = program.weights
    assert program.workspaces or conv == "direct"
    assert all(program.free_during(each.first)[1] >= each.bytes for each in program.workspaces)
    kinds = {
        lowered.sources[array_digest(each)].preparation.kind for each in packed if array_digest(each) in lowered.sources
    }
    assert kinds == ({"PANELS", "WINOGRAD_PANELS"} if conv == "winograd" else {"PANELS"})
    seen: set[bytes] = set()

    def look(_kernel: str, tensors: list[np.ndarray]) -> None:
        seen.update(map(array_digest, tensors))

    for threads in (1, 3):
        seen.clear()
        with Model(tmp_path / "a", threads) as model:
            (found,) = model.watch({imported.inputs[0].name: x.numpy()}, look).values()
        assert {array_digest(each) for each in packed} <= seen
        np.testing.assert_allclose(found, network(x).detach().numpy(), atol=1e-4)

    store = store_of(packed, lowered.sources, most_inline)
    parameters = sum(each.nbytes for each in {id(p): p.detach().numpy() for p in network.parameters()}.values())
    zeros = int((network.zeros.weight == 0).sum()) * 4
    lists = sum(each.nbytes for each in packed if each.dtype == np.int32)
    assert store.size < parameters - 0.9 * zeros + lists + 128 * len(packed) + 2 * PAGE  # as each begins a line
    if most_inline:
        assert store.names == []
    else:
        _is_a_readable_file(tmp_path / "a/weights.safetensors", store)


def _is_a_readable_file(path: Path, store: Store) -> None:
    from safetensors.numpy import load_file

    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert (8 + size) % PAGE == 0
    assert set(store.names) <= set(load_file(path))
    begins = [entry["data_offsets"][0] for name, entry in json.loads(data[8 : 8 + size]).items() if name in store.names]
    assert all(begin % 64 == 0 for begin in begins)
    leaves = b"".join(hashlib.sha256(data[at : at + CHUNK]).digest() for at in range(0, len(data), CHUNK))
    assert store.digest() == hashlib.sha256(leaves).digest()


@pytest.mark.parametrize("sizes", [[0], [1], [CHUNK], [CHUNK - 1, 1, 1], [3, 2 * CHUNK, 5]])
def test_the_hash_is_one_of_the_whole_however_it_is_cut(sizes):
    data = np.random.default_rng(0).bytes(sum(sizes))
    pieces = [data[sum(sizes[:at]) : sum(sizes[: at + 1])] for at in range(len(sizes))]
    assert Store([], pieces).digest() == Store([], [data]).digest()


@pytest.fixture(scope="module")
def imported():
    """A layer of 8.4 MiB of weights, which Winograd's transform with tiles of four makes more than fivefold."""
    torch.manual_seed(4)
    convolution = nn.Conv3d(256, 320, 3, padding=1).eval()
    return import_model(convolution, example_inputs=(torch.randn(1, 256, 4, 16, 16),), check=False)


@pytest.mark.parametrize(("memory", "least", "most"), [("small", 1, 1), ("balanced", 1.7, 2.4), ("fast", 2.4, 10)])
def test_memory_limits_how_far_weights_grow(imported, memory, least, most):
    lowered = lower(imported.mod, load_target("host"), Options(threads=1, memory=memory))
    (source,) = (each for each in lowered.sources.values() if each.weight.ndim > 1)
    assert least <= source.preparation.apply(source.weight).nbytes / source.weight.nbytes <= most


def test_balanced_gives_a_large_layer_more_where_the_whole_network_has_the_room():
    """Linear layers that do not grow leave it to a convolution, up to a share of all weights."""
    torch.manual_seed(4)
    network = nn.Sequential(nn.Conv3d(256, 320, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    network += nn.Sequential(nn.Linear(320, 50000), nn.Linear(50000, 400))
    imported = import_model(network.eval(), example_inputs=(torch.randn(1, 256, 4, 16, 16),), check=False)
    lowered = lower(imported.mod, load_target("host"), Options(threads=1))
    sources = [each for each in lowered.sources.values() if each.weight.ndim > 1]
    assert sum(each.weight.size for each in sources) == 256 * 320 * 27 + 320 * 50000 + 50000 * 400
    grown = {each.weight.size: each.preparation.apply(each.weight).nbytes - each.weight.nbytes for each in sources}
    own = sum(each.weight.nbytes for each in sources)
    assert grown.pop(256 * 320 * 27) > (LARGE.growth - 1) * 4 * 256 * 320 * 27
    assert sum(grown.values()) < 0.01 * own
    assert lowered.limits
    assert sum(each.preparation.apply(each.weight).nbytes for each in sources) <= (1 + BALANCED_GROWTH) * own


class Masked(nn.Module):
    """Two convolutions and a linear layer that leaves them room; ``masked``: channels and frames between the two."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Conv3d(64, 256, 3, padding=1), nn.Conv3d(256, 320, 3, padding=1)
        self.last, self.masked = nn.Linear(320, 50000), masked

    def forward(self, x: torch.Tensor, channels: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = self.second(y * (channels > 0.5).float() * (frames > 0.5).float() if self.masked else y)
        return self.last(y.mean((2, 3, 4)))


def test_balanced_gives_layers_under_masks_what_they_get_without():
    given = (torch.randn(1, 64, 4, 16, 16), torch.ones(1, 256, 1, 1, 1), torch.ones(1, 1, 4, 1, 1))
    found = []
    for masked in (False, True):
        imported = import_model(Masked(masked).eval(), example_inputs=given, check=False)
        found.append(lower(imported.mod, load_target("host"), Options(threads=1)).limits)
    assert [*found[0].values()] == [*found[1].values()]
    assert [*found[1]] == ["second", "last"], "the first layer's weights are not large: it has no limit"


def test_little_memory_goes_where_it_saves_most():
    """One early layer with few weights and many positions, one late one: the first grows, within the limit of both."""
    torch.manual_seed(5)
    network = nn.Sequential(nn.Conv3d(48, 48, 3, padding=1), nn.MaxPool3d(4), nn.Conv3d(48, 640, 3, padding=1)).eval()
    imported = import_model(network, example_inputs=(torch.randn(1, 48, 8, 24, 24),), check=False)
    lowered = lower(imported.mod, load_target("host"), Options(threads=1, memory="small"))
    sources = [each for each in lowered.sources.values() if each.weight.ndim > 1]
    early, late = sorted(sources, key=lambda each: each.weight.nbytes)
    assert early.preparation.kind == "WINOGRAD_PANELS"
    packed = sum(each.preparation.apply(each.weight).nbytes for each in sources)
    own = sum(each.weight.nbytes for each in sources)
    assert packed <= own + max(MOST_GROWTH * own, SMALL_BYTES)
    assert late.preparation.apply(late.weight).nbytes == late.weight.nbytes


def test_what_memory_has_no_room_for_is_transformed_in_every_call(tmp_path):
    """In small alone, where the arena has the room anyway: a first layer with large activations, then one whose
    transform would take eight times its weights."""
    torch.manual_seed(6)
    layers = [nn.Conv3d(4, 96, 1), nn.MaxPool3d((1, 2, 2)), nn.Conv3d(96, 128, 3, padding=1)]
    network, x = nn.Sequential(*layers).eval(), torch.randn(1, 4, 8, 48, 48)
    kernels = {}
    for memory in ("small", "fast"):
        options = Options(threads=1, memory=memory)
        artifact = build_network(network, tmp_path / memory, example_inputs=(x,), options=options, check=False).artifact
        with Model(artifact.path) as model:
            (answer,) = model.run({"input": x.numpy()}).values()
        with torch.no_grad():
            expected = network.double()(x.double()).numpy()
        network.float()
        assert np.abs(answer - expected).max() <= 1e-5 * np.abs(expected).max()
        kernels[memory] = [each.name for each in artifact.manifest.kernels.values()]
    assert any(name.startswith("transform_weights") for name in kernels["small"])
    assert not any(name.startswith("transform_weights") for name in kernels["fast"])


def test_what_is_spent_is_within_the_limit_and_saves_most():
    layers = [[(0, 9.0), (50, 5.0), (100, 1.0)], [(0, 8.0), (60, 2.0)], [(0, 3.0)]]
    assert spend(layers, 112) == [1, 1, 0]
    assert spend(layers, 100) == [2, 0, 0]
    assert spend(layers, 45) == [0, 0, 0]


def test_weights_prepared_in_the_file_are_what_would_be_prepared(network, tmp_path):
    x = torch.randn(1, 3, 5, 11, 12)
    answers, sizes = [], []
    for prepared in (False, True):
        options = Options(threads=2, conv="winograd", prepared=prepared)
        path = build_network(network, tmp_path / str(prepared), example_inputs=(x,), options=options, check=False)
        with Model(path.artifact.path) as model:
            answers += model.run({"x": x.numpy()}).values()
        sizes.append(path.artifact.library.stat().st_size)
    np.testing.assert_array_equal(*answers)
    assert sizes[1] > 1.4 * sizes[0]


def test_a_disk_that_fills_up_and_memory_that_does_not_suffice_are_told_in_a_sentence(tmp_path, monkeypatch):
    x = torch.randn(1, 2300)
    layer = nn.Sequential(nn.Linear(2300, 1150), nn.Linear(1150, 2300), nn.Linear(2300, 2300)).eval()  # 10, 10, 20 MiB

    def full(_store: Store, path: Path) -> None:
        path.write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)
        with pytest.raises(DanceError, match="no space left"):
            build_network(layer, tmp_path / "full", example_inputs=(x,), check=False)
    assert list(tmp_path.iterdir()) == []

    path = build_network(layer, tmp_path / "whole", example_inputs=(x,), check=False).artifact.path
    code = (
        "import resource, sys, dance_model\n"
        "def kib(name): return int(open('/proc/self/status').read().split(name)[1].split()[0])\n"
        "model = dance_model.Model(sys.argv[1])\n"
        "print(kib('VmHWM:') - kib('VmRSS:'))\n"
        "model.close()\n"
        "used = 4096 * int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (50 << 20),) * 2)  # for the file alone\n"
        "try: dance_model.Model(sys.argv[1], 1)\n"
        "except dance_model.ModelError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(dance_model.__file__).parent)
    beyond, sentence = done.stdout.splitlines()
    assert sentence == "memory is short", done.stderr
    assert int(beyond) < 15 << 10  # KiB: the last layer prepared is a small one


def test_scratch_lies_where_nothing_else_does():
    """Pieces in use from their first step to their last; what is free during a step is lent to its kernel."""
    program = Program(
        storages=[Storage(256, 0, 1, 0), Storage(64, 1, 2, 256), Storage(100, 2, 3, 0), Storage(512, 3, 3, 128)]
    )
    assert [program.free_during(step) for step in range(3)] == [(256, 384), (320, 320), (320, 320)]
    assert program.free_during(3)[1] == 0


class Cell(nn.Module):
    """A recurrent layer, one convolution for all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(24, 64, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = cell = x[:, 0, :1].repeat(1, 16, 1, 1) * 0
        for frame in range(x.shape[1]):
            gates = self.gates(torch.cat([x[:, frame], hidden], 1))
            admit, forget, show, new = gates.chunk(4, 1)
            cell = torch.sigmoid(forget) * cell + torch.sigmoid(admit) * torch.tanh(new)
            hidden = torch.sigmoid(show) * torch.tanh(cell)
        return hidden


def pruned() -> nn.Module:
    """Three tenths of the columns are left in kernel groups of 16 filters and 4 channels."""
    layer = nn.Conv3d(64, 128, 3, padding=1)
    kept = torch.rand(8, 16, 27) < 0.3
    layer.weight.data *= kept.repeat_interleave(16, 0).repeat_interleave(4, 1).reshape(layer.weight.shape)
    return layer


@pytest.mark.parametrize(("make", "shape"), [(Cell, (1, 4, 8, 12, 12)), (pruned, (1, 64, 4, 8, 8))])
def test_what_is_used_often_is_stored_once_and_what_is_pruned_not_at_all(make, shape):
    torch.manual_seed(6)
    network, target = make().eval(), load_target("host")
    lowered = lower(import_model(network, example_inputs=(torch.randn(shape),), check=False).mod, target, Options())
    with target.tvm_target(1):
        planned = relax.get_pipeline("default_build")(lowered.mod)
    store = store_of(program_of(planned, list(lowered.weights.values())).weights, lowered.sources)
    kept = sum(4 * int((parameter != 0).sum()) for parameter in network.parameters())
    assert store.size <= 1.1 * kept
