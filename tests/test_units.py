"""Units of skipping: what training decides together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_dance import SHAPE, Three
from torch import Tensor, nn
from typer.testing import CliRunner
from untrained import keep_at_random

from dance_tvm import models
from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.core.errors import DanceError
from dance_tvm.frontend import import_model
from dance_tvm.lowering.machine import machine_of
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.units import Serving, servings
from dance_tvm.schedules.workload import POOL, Workload
from dance_tvm.sparsity.dance.controller import Masks
from dance_tvm.sparsity.dance.macs import MacCounter
from dance_tvm.sparsity.dance.method import AAP, controller_of, prune
from dance_tvm.sparsity.dance.predicted_time import TimeCounter
from dance_tvm.sparsity.dance.site_units import layer_times, site_units
from dance_tvm.sparsity.dance.sites import trace
from dance_tvm.sparsity.dance.trained import load
from dance_tvm.sparsity.tasks import Logits
from dance_tvm.sparsity.units import LayerTimes, SiteUnits, Units, read_units, write_units
from dance_tvm.train import app as train_app
from dance_tvm.train import run
from dance_tvm.units import units as units_command

#: Frames, channels and positions of each site of Three.
GIVEN = ((4, 4, (4, 4)), (3, 5, (3, 2)), (4, 4, (1, 3)))


class Paths(nn.Module):
    """A ReLU behind a 3×3×3 convolution, and one behind a 3×3×3 convolution and a 1×1×1 one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv3d(4, 32, 3, padding=1), nn.Conv3d(32, 32, 3, padding=1)
        self.mix = nn.Conv3d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.mix(self.second(torch.relu(self.first(x)))))


class Branches(nn.Module):
    """Two branches that share their second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv3d(4, 16, (1, 3, 3)), nn.Conv3d(4, 16, (1, 3, 3))
        self.mix, self.last = nn.Conv3d(16, 16, (3, 1, 1)), nn.Conv3d(32, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(torch.cat([torch.relu(self.mix(self.one(x))), self.mix(self.two(x))], 1)))


def _served(workloads: dict[str, Workload]) -> dict[str, list[Serving]]:
    """The kernels that could serve each convolution on this machine, the best first."""
    machine = machine_of(load_target("host"))
    return {name: servings(workload, machine) for name, workload in workloads.items() if workload.family != POOL}


def units_of_three() -> list[SiteUnits]:
    sites = trace(Three(), SHAPE)[1]
    return [
        SiteUnits(node=site.node, shape=site.shape, frames=frames, channels=channels, positions=positions)
        for site, (frames, channels, positions) in zip(sites, GIVEN, strict=True)
    ]


def in_units(mask: Tensor, axis: int, unit: int) -> bool:
    """Whether ``mask`` has one value in each unit along ``axis``."""
    size = mask.shape[axis]
    first = torch.arange(size) // unit * unit
    return torch.equal(mask, mask.index_select(axis, first))


def test_masks_are_one_value_a_unit_and_the_compiler_carries_them() -> None:
    units = units_of_three()
    torch.manual_seed(0)
    clips = torch.rand(6, *SHAPE) * torch.rand(6, 1, SHAPE[1], 1, 1)
    graph = keep_at_random(prune(Three(), SHAPE, units=units), clips, 0.6)
    with torch.no_grad():
        graph(clips)
    varied = 0
    assert controller_of(graph).decisions[-1].frames is None  # one unit of all frames
    for unit, masks in zip(units, controller_of(graph).decisions, strict=True):
        channels, frames, height, width = unit.shape
        if masks.frames is not None:
            assert masks.frames.shape[2] == frames
            assert in_units(masks.frames, 2, unit.frames)
        assert masks.channels is not None
        assert masks.positions is not None
        assert masks.channels.shape[1] == channels
        assert in_units(masks.channels, 1, unit.channels)
        assert tuple(masks.positions.shape[3:]) == (height, width)
        assert all(in_units(masks.positions, 3 + axis, size) for axis, size in enumerate(unit.positions))
        varied += sum(0 < float(mask.mean()) < 1 for mask in masks if mask is not None)
    assert varied > 5
    import_model(graph, example_inputs=(clips[:1],))  # compares with the source


def test_a_grid_is_the_most_tiles_along_an_edge_and_its_tiles_are_whole_units() -> None:
    unit = SiteUnits(node="relu", shape=(8, 4, 56, 55), frames=1, channels=8, positions=(4, 6))
    assert unit.counts == (4, 1, (14, 10))
    coarse = unit.at_most(5)
    assert (coarse.positions, coarse.counts[2]) == ((12, 12), (5, 5))
    assert unit.at_most(14) == unit


def test_training_takes_units_and_the_card_keeps_them(tmp_path: Path) -> None:
    sites = trace(models.create("c3d-mini", num_classes=8), (1, 16, 32, 32))[1]
    given = [
        SiteUnits(node=s.node, shape=s.shape, frames=2, channels=16, positions=(min(4, s.shape[2]),) * 2) for s in sites
    ]
    graph = trace(models.create("c3d-mini", num_classes=8), (1, 16, 32, 32))[0]
    times = tuple(
        LayerTimes(
            layer=str(layer.node.target), kernel="direct", unit_frames=1, unit_channels=16, unit_positions=(2, 2),
            frames=(2.0, 1.0), channels=(2.0, 0.5), positions=(2.0, 1.2),
        )
        for layer in MacCounter(graph).layers
    )  # fmt: skip
    file = tmp_path / "units.json"
    facts = {"network": "c3d-mini", "target": "host", "threads": 1, "sites": tuple(given)}
    write_units(Units(**facts, live_shares=(1.0, 0.5), layers=times), file)
    assert read_units(file).sites == tuple(given)
    options = {"units": str(file), "target_time": 0.5}
    run(
        method="aap", model="c3d-mini", data="motion-digits,train=8,test=8", out=tmp_path / "out", options=options,
        epochs=1, batch=8,
    )  # fmt: skip
    network, card = load(tmp_path / "out" / "model.safetensors")
    assert card["dance"]["units"][0]["channels"] == 16
    assert card["predicted_seconds"] == {"dense": 12.0, "target": 6.0}
    assert {"share", "time_share", "predicted_seconds"} <= set(card["metrics"])
    assert controller_of(network).groups == [-(-site.shape[0] // 16) for site in sites]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Invalid JSON"),
        ('{"schema_version": 2, "network": "a", "target": "host", "threads": 1, "sites": []}', "schema_version"),
        ('{"network": "a", "target": "host", "threads": 0, "sites": []}', "threads"),
    ],
)
def test_a_file_that_holds_no_units_is_refused(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "units.json"
    file.write_text(text)
    with pytest.raises(DanceError, match=told):
        read_units(file)
    with pytest.raises(DanceError, match="cannot be read"):
        read_units(tmp_path / "none.json")


SHARES = (1.0, 0.5, 0.25)


def times_of_three(*, sites: tuple[SiteUnits, ...] | None = None, **changes: object) -> Units:
    """Three layers of 6 s, 3 s and 1.5 s, whose times fall in proportion to one of their axes, or not at all."""
    whole, falling, flat = (6.0, 6.0, 6.0), (3.0, 1.5, 0.75), (1.5, 1.5, 1.5)
    given = {"kernel": "direct", "unit_frames": 2, "unit_channels": 4, "unit_positions": (4, 4)}
    names = [str(layer.node.target) for layer in MacCounter(trace(Three(), SHAPE)[0]).layers]
    layers = [
        LayerTimes(layer=names[0], frames=whole, channels=whole, positions=whole, **given),
        LayerTimes(layer=names[1], frames=falling, channels=(3.0,) * 3, positions=(3.0,) * 3, **given),
        LayerTimes(layer=names[2], frames=flat, channels=flat, positions=(1.5, 0.9, 0.6), **given),
    ]
    facts = {"network": "three", "target": "host", "threads": 1, "sites": sites or tuple(units_of_three())}
    return Units(**{**facts, "live_shares": SHARES, "layers": tuple(layers), **changes})


def test_predicted_time_is_that_of_live_units_and_has_a_gradient() -> None:
    graph = prune(Three(), SHAPE, units=units_of_three())
    counter = MacCounter(graph)
    times = TimeCounter(counter, times_of_three())
    assert times.dense == 10.5
    assert times.seconds([], 2).tolist() == pytest.approx([10.5, 10.5])
    frames = torch.ones(2, 1, SHAPE[1], 1, 1)
    frames[1, :, SHAPE[1] // 2 :] = 0
    masks = [Masks(frames, None, None)] + [Masks(None, None, None)] * 2
    found = times.seconds(masks, 2)
    assert float(found[0]) == pytest.approx(10.5)
    assert 10.5 - 1.5 <= float(found[1]) < 10.5 - 0.5  # the second layer alone is told to gain by frames
    frames.requires_grad_()
    times.seconds(masks, 2).sum().backward()
    assert frames.grad is not None
    assert float(frames.grad.abs().sum()) > 0
    nothing = [Masks(torch.zeros(1, 1, SHAPE[1], 1, 1), None, None)] * 3
    assert 0 < float(times.seconds(nothing, 1)) < 10.5


def test_units_fit_the_network_that_training_wraps() -> None:
    """`units` sees the network of the zoo, training without labels the same one before its sigmoid."""
    modules = nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Conv3d(8, 8, 3), nn.ReLU())
    of_modules = [
        SiteUnits(node=site.node, shape=site.shape, frames=1, channels=4, positions=(1, 1))
        for site in trace(modules, SHAPE)[1]
    ]
    prune(Logits(modules), SHAPE, units=of_modules)
    graph = prune(Logits(Three()), SHAPE, units=units_of_three())
    assert TimeCounter(MacCounter(graph), times_of_three()).dense == 10.5


def test_times_of_other_layers_or_none_are_refused(tmp_path: Path) -> None:
    counter = MacCounter(prune(Three(), SHAPE, units=units_of_three()))
    with pytest.raises(DanceError, match="gives no times"):
        TimeCounter(counter, times_of_three(layers=()))
    with pytest.raises(DanceError, match="time of no layer where the network has"):
        TimeCounter(counter, times_of_three(layers=times_of_three().layers[:2]))
    for wrong in ({"live_shares": (0.5, 1.0)}, {"live_shares": (1.0, 0.5)}):
        text = json.dumps({**times_of_three().model_dump(), **wrong})
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(DanceError, match=r"live shares|live_shares"):
            read_units(tmp_path / "wrong.json")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target_time": 0.5}, "needs --set units"),
        ({"target_time": 0.5, "target_macs": 0.5, "units": "u.json"}, "leave --target-macs or the time out"),
        ({"target_time": 0.5, "start": 2, "units": "u.json"}, "start meets a budget of multiply-adds"),
    ],
)
def test_one_budget_at_a_time(options: dict[str, object], told: str) -> None:
    with pytest.raises(DanceError, match=told):
        AAP(**options)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--budget", "time:0.5", "--target-macs", "0.5"], "give one of them"),
        (["--budget", "half"], "not of the form"),
        (["--budget", "time:0.5", "--method", "kgs"], "kgs takes --rate"),
    ],
)
def test_a_wrong_budget_is_told(words: list[str], told: str) -> None:
    result = CliRunner().invoke(train_app, [*words, "--print-config"])
    assert told in str(result.exception)


def test_units_of_another_network_are_refused() -> None:
    with pytest.raises(DanceError, match="those of 2 sites, and the network has 3"):
        prune(Three(), SHAPE, units=units_of_three()[:2])
    with pytest.raises(DanceError, match="where the network has"):
        prune(Three(), (1, 8, 32, 32), units=units_of_three())


def test_sites_take_the_units_of_the_layers_that_their_masks_reach() -> None:
    """Tiles of Winograd kernels: of the layer before the site, and of the one before a 1×1×1 layer."""
    machine = machine_of(load_target("host"))
    network, clip = Paths(), (4, 8, 24, 24)
    mod = import_model(network.eval(), example_inputs=(torch.zeros(1, *clip),), check=False).mod
    workloads = lower(mod, load_target("host"), Options(threads=1)).workloads
    found = _served(workloads)
    kernels = {name: {serving.kernel: serving for serving in served} for name, served in found.items()}
    convs = [name for name in kernels if workloads[name].window.kernel != (1, 1, 1)]
    chosen = {name: next(iter(of.values())) for name, of in kernels.items()}
    first, second = convs
    chosen[first], chosen[second] = kernels[first]["winograd_1x4x4"], kernels[second]["winograd_2x3x3"]
    sites = site_units(network, clip, workloads, chosen)
    assert [(site.frames, site.positions) for site in sites] == [(1, (4, 4)), (2, (3, 3))]
    assert all(site.channels == machine.vector_floats for site in sites)
    halves = kernels[second]["winograd_2x3x3"].seconds["positions"]
    assert halves == tuple(sorted(halves, reverse=True))


def test_sites_find_their_layers_in_whatever_order_those_are_built() -> None:
    """Relax may visit branches in another order than the network runs them; a module called again is a layer more."""
    network, clip = Branches().eval(), (4, 4, 8, 8)
    workloads = lower(
        import_model(network, example_inputs=(torch.zeros(1, *clip),), check=False).mod,
        load_target("host"),
        Options(threads=1),
    ).workloads
    found = {name: served[0] for name, served in _served(workloads).items()}
    times = layer_times(network, clip, dict(reversed(workloads.items())), found)
    assert [time.layer for time in times] == ["one", "mix", "two", "mix", "last"]
    assert [time.kernel for time in times] == [found[name].kernel for name in ("one", "mix", "two", "mix_1", "last")]
    del workloads["mix_1"]
    with pytest.raises(DanceError, match="mix_1 of Branches is not a separate layer"):
        site_units(network, clip, workloads, found)


def test_the_command_writes_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "units.json"
    units_command(model="c3d-mini", target="host", threads=1, kernels=2, out=file, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [site["node"] for site in told["sites"]] == [site.node for site in read_units(file).sites]
    kernels = {kernel["kernel"] for layer in told["layers"] for kernel in layer["kernels"]}
    assert "direct" in kernels
    assert any(name.startswith("winograd_") for name in kernels)
    other = tmp_path / "other.onnx"
    other.touch()
    with pytest.raises(DanceError, match="only networks of the zoo"):
        units_command(model=str(other), target="host", threads=1, kernels=1, out=file, as_json=False)


def test_units_in_half_precision_are_vectors_of_twice_as_many_channels(tmp_path: Path) -> None:
    """Where a direct kernel serves the layer: Winograd multiplies in float32 in either type."""
    channels = {}
    for dtype in ("float32", "float16"):
        file = tmp_path / f"{dtype}.json"
        units_command(model="c3d-mini", target="snapdragon", threads=1, out=file, dtype=dtype)
        kernels = {layer.layer: layer for layer in read_units(file).layers}
        channels[dtype] = {layer.kernel: layer.unit_channels for layer in kernels.values()}
    assert set(channels["float32"].values()) == {4}
    assert channels["float16"]["direct"] == 8
    assert {lanes for kernel, lanes in channels["float16"].items() if kernel != "direct"} <= {4}
    with pytest.raises(DanceError, match="cannot compute in half precision"):
        units_command(model="c3d-mini", target="opencl", dtype="float16")
