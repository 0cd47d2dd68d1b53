"""Imports: every ordinary operator agrees with its source, layers keep their names, bad files end in one sentence."""

from __future__ import annotations

import io
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import nn
from tvm import relax

from dance_tvm import build_network, models
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.frontend import import_model, interpreter, torch_conversions
from dance_tvm.frontend.files import load_program

torch.manual_seed(0)
CLIPS = torch.randn(2, 8, 6, 10, 10)


class Layer(nn.Module):
    """A function of the input and of some modules, as a network."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return self.function(x, *self.parts)


def each(*parts):
    return Layer(lambda x, *modules: [module(x) for module in modules], *parts)


def temporal_shift(x):
    shifted = torch.zeros_like(x)
    shifted[:, :2, :-1] = x[:, :2, 1:]
    shifted[:, 2:4, 1:] = x[:, 2:4, :-1]
    shifted[:, 4:] = x[:, 4:]
    return shifted


def squeeze_excite(x, reduce, expand):
    return x * torch.sigmoid(expand(F.relu(reduce(F.adaptive_avg_pool3d(x, 1)))))


def hard_masks(x):
    """The forms in which DANCE and D-STEP write their decisions."""
    by_channel = x.mean((2, 3, 4), keepdim=True)
    by_frame = x.std((1, 3, 4), keepdim=True)
    by_position = x.amax((1, 2), keepdim=True)
    return [
        x * (by_channel > 0).float(),
        x * (by_frame > 1).to(x.dtype) * torch.round(torch.sigmoid(by_position)),
        x * torch.where(by_frame > 1, 1.0, 0.0),
        x * torch.where(by_channel >= 0, 1, 0),
        x * ((by_channel > 0) & (by_frame < 1.0)),
        x * (~(by_channel > 0)) * torch.logical_or(by_frame > 1, by_position > 2),
        x * (x.var((3, 4), keepdim=True, unbiased=False) >= 1).int(),
        x * (x.flatten(2).max(2)[0] > 2)[:, :, None, None, None],
        x * torch.ceil(torch.clamp(by_channel, 0, 1)) * torch.sign(by_frame),
        x.masked_fill(x < 0, 0.0),
        x * F.one_hot(x.mean((3, 4)).argmax(1), 8).permute(0, 2, 1)[..., None, None].float(),
    ]


NETWORKS = {
    "transposed convolutions": each(
        nn.ConvTranspose3d(8, 6, (2, 4, 3), stride=2, padding=1, output_padding=(0, 0, 1)),
        nn.ConvTranspose3d(8, 6, 3, stride=(1, 2, 2), padding=1, groups=2, dilation=(1, 2, 1)),
        nn.ConvTranspose3d(8, 4, 1, stride=2, padding=0),
    ),
    "transposed convolution of pictures": Layer(
        lambda x, up: up(x[:, :, 0]), nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
    ),
    "convolutions": each(
        nn.Conv3d(8, 8, 3, padding="same"),
        nn.Conv3d(8, 8, (4, 2, 2), padding="same"),
        nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate"),
        nn.Conv3d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(8, 16, 3, groups=8, dilation=(1, 2, 2), stride=(2, 1, 1)),
    ),
    "activations": Layer(
        lambda x, *modules: torch.cat([module(x) for module in modules], 1),
        *(nn.ELU(), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.GELU(), nn.GELU(approximate="tanh")),
        *(nn.Softplus(), nn.LeakyReLU(), nn.ReLU6(), nn.Mish(), nn.SELU(), nn.CELU(1.5), nn.Tanh(), nn.Softsign()),
        *(nn.LogSigmoid(), nn.Hardtanh(), nn.PReLU(8), nn.PReLU(), nn.Threshold(0.1, 0.2)),
    ),
    "squeeze and excite": Layer(squeeze_excite, nn.Conv3d(8, 4, 1), nn.Conv3d(4, 8, 1)),
    "softmax heads": Layer(
        lambda x, head: (F.softmax(head(x.mean((2, 3, 4))), -1), F.log_softmax(head(x.mean((2, 3, 4))), 1)),
        nn.Linear(8, 5),
    ),
    "average pools": each(
        nn.AvgPool3d(3, 2, 1),
        nn.AvgPool3d(3, 2, 1, count_include_pad=False),
        nn.AvgPool3d(3, 2, 1, ceil_mode=True),
        nn.AvgPool3d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool3d(3, 2, 1, divisor_override=5),
        nn.AvgPool3d((1, 2, 2)),
    ),
    "max pools": each(
        nn.MaxPool3d(3, 2, 1),
        nn.MaxPool3d(3, 2, 1, ceil_mode=True),
        nn.MaxPool3d(2, 1, dilation=2),
        nn.MaxPool3d(2, padding=(0, 1, 1)),
    ),
    "adaptive pools": each(
        nn.AdaptiveAvgPool3d(1),
        nn.AdaptiveAvgPool3d((4, 3, 5)),
        nn.AdaptiveAvgPool3d((None, 1, 1)),
        nn.AdaptiveMaxPool3d(1),
        nn.AdaptiveMaxPool3d((4, 3, 6)),
    ),
    "norms": each(
        nn.GroupNorm(2, 8),
        nn.InstanceNorm3d(8, affine=True),
        nn.LayerNorm([10, 10]),
        nn.BatchNorm3d(8),
        nn.BatchNorm3d(8, affine=False),
    ),
    "temporal shift": Layer(lambda x: [temporal_shift(x), torch.roll(x, (1, 2), (2, 3)) + torch.roll(x, -1, 2)]),
    "slices": Layer(
        lambda x: [x[:, :, ::2, -3:, 1:-1], torch.flip(x, [2, 4]), torch.cat([x[:, :4, 1:], x[:, 4:, :-1]], 1)]
    ),
    "indices": Layer(
        lambda x: [x[:, torch.tensor([0, 3, 1])], x[:, [1, -1, 3]], x[:, :, torch.tensor([[0], [2]]), torch.arange(4)]]
    ),
    "towers": Layer(lambda x: torch.cat([torch.stack(torch.chunk(x, 2, 1), 1).flatten(1, 2), *x.split([3, 5], 1)], 1)),
    "masks": Layer(hard_masks),
    "resizing": Layer(
        lambda x: [
            F.interpolate(x, scale_factor=2),
            F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear"),
            F.interpolate(x, size=(4, 6, 6), mode="trilinear", align_corners=True),
        ]
    ),
    "paddings": Layer(lambda x: [F.pad(x, (1, 2, 0, 1, 2, 0)), F.pad(x, (0, 0, 0, 0, -1, 1))]),
    "attention": Layer(
        lambda x, attend: attend(*[x.flatten(2).transpose(1, 2)[:, :20]] * 3, need_weights=False)[0],
        nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "products": Layer(
        lambda x, linear: [x @ x.transpose(3, 4), torch.einsum("ncthw,ndthw->ncd", x, x), linear(x.movedim(1, -1))],
        nn.Linear(8, 3),
    ),
    "integers": Layer(
        lambda x: [
            (x * 10).int() >> 1,
            (x * 10).int() << 2,
            (x * 10).long() // 3,
            torch.div((x * 10).int(), 3, rounding_mode="trunc"),
            (x * 10).int() % 3,
            torch.sum(x > 0, 1),
            torch.any(x > 2, 1),
            torch.zeros(2, 8).scatter_add(1, (x.flatten(1)[:, :20] * 3).long().clamp(0, 7), x.flatten(1)[:, :20]),
        ]
    ),
    "statistics": Layer(
        lambda x: [
            *torch.std_mean(x, dim=1),
            x.var((3, 4)),
            F.normalize(x, dim=1),
            x.argmax(1),
            x.min(1)[1],
            x.cumsum(2),
            x.topk(3, 1)[0],
        ]
    ),
    "results in a dictionary": Layer(lambda x: {"a": x + 1, "b": [x * 2, x]}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_operators_agree_with_their_source(name):
    network = NETWORKS[name].eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    imported = import_model(network, example_inputs=(CLIPS,), check=False)
    arrays = random_inputs(imported.inputs)
    expected = imported.reference(arrays)
    found = interpreter.outputs(imported.mod, {imported.mod["main"].params[0].name: arrays["x"]})
    assert len(found) == len(expected) == len(imported.outputs)
    for spec, value in zip(imported.outputs, found, strict=True):
        assert (tuple(value.shape), str(value.dtype)) == (spec.shape, f"torch.{spec.dtype}")
        torch.testing.assert_close(value, torch.from_numpy(expected[spec.name]), rtol=1e-4, atol=1e-4)


def test_dictionary_keys_name_the_outputs():
    imported = import_model(NETWORKS["results in a dictionary"], example_inputs=(CLIPS,), check=False)
    assert [spec.name for spec in imported.outputs] == ["output_a", "output_b_0", "output_b_1"]


@pytest.fixture(scope="module")
def mini():
    return import_model("c3d-mini")


def _variables(mod: tvm.IRModule) -> dict[str, str]:
    """The operator behind each variable."""
    bindings = [binding for block in mod["main"].body.blocks for binding in block.bindings]
    return {b.var.name: getattr(getattr(b.value, "op", None), "name", "") for b in bindings}


def test_layers_keep_their_names(mini):
    operators = _variables(mini.mod)
    for layer in ("conv1", "conv2", "conv3a", "conv3b", "conv4a", "conv4b"):
        assert operators[layer] == "relax.nn.conv3d"
    assert (operators["bn3a"], operators["pool2"], operators["fc"]) == (
        "relax.nn.batch_norm",
        "relax.nn.max_pool3d",
        "relax.matmul",
    )


def test_inner_layers_have_dotted_names():
    mod = import_model(models.create("r2plus1d-mini"), example_inputs=models.example_inputs("r2plus1d-mini")).mod
    operators = _variables(mod)
    assert operators["layer2.0.conv1.temporal"] == operators["layer2.0.shortcut"] == "relax.nn.conv3d"
    assert operators["layer2.0.add"] == "relax.add"


def test_inputs_and_outputs_are_described(mini):
    (clip,), (scores,) = mini.inputs, mini.outputs
    assert (clip.name, clip.shape, clip.dtype) == ("x", (1, 1, 16, 32, 32), "float32")
    assert (scores.name, scores.shape) == ("scores", (1, 10))
    assert "N, C, T, H, W" in clip.meaning


def test_the_digest_identifies_the_source(mini):
    def digest(seed):
        network = models.create("c3d-mini", seed=seed)
        return import_model(network, example_inputs=models.example_inputs("c3d-mini"), check=False).source_sha256

    assert digest(0) == mini.source_sha256
    assert digest(1) != mini.source_sha256


@pytest.mark.parametrize("mode", [partial(torch.autocast, "cpu", dtype=torch.bfloat16), torch.no_grad])
def test_the_digest_covers_parts_that_run_in_a_mode_of_their_own(mode):
    def network(factor):
        def forward(x):
            with mode():
                return (x * factor).float()

        return Layer(forward)

    digests = {
        import_model(network(factor), example_inputs=(CLIPS,), check=False).source_sha256 for factor in (2.0, 3.0, 3.0)
    }
    assert len(digests) == 2


def test_masks_stay_multiplications_by_a_small_tensor():
    network = Layer(lambda x: x * (x.mean((2, 3, 4), keepdim=True) > 0).float())
    mod = import_model(network, example_inputs=(CLIPS,)).mod
    bindings = [binding for block in mod["main"].body.blocks for binding in block.bindings]
    (product,) = [b.value for b in bindings if "multiply" in str(getattr(b.value, "op", ""))]
    assert tuple(int(extent) for extent in product.args[1].ty.shape) == (2, 8, 1, 1, 1)


def test_tvm_computes_what_the_interpreter_does():
    """The interpreter stands in for TVM in every check: here TVM itself has the last word."""

    def function(x, convolve, up, pool, norm):
        shifted = temporal_shift(norm(convolve(x)))
        histogram = torch.zeros(2, 5).scatter_add(1, (x.flatten(1)[:, :9] * 2).long().clamp(0, 4), x.flatten(1)[:, :9])
        return [
            *hard_masks(x)[:8],
            F.silu(pool(shifted)),
            up(x[:, :, :2, :4, :4]),
            histogram,
            F.interpolate(x[..., :3, :3], scale_factor=2),
            x[:, :, torch.tensor([[0], [2]]), torch.arange(4)],
            F.pad(x, (1, 2, 0, 1, 2, 0)),
            x.std((1, 3, 4)),
            (x * 10).int() >> 1,
        ]

    network = Layer(
        function,
        nn.Conv3d(8, 8, 3, padding=1),
        nn.ConvTranspose3d(8, 2, 3, stride=2, padding=1),
        nn.AvgPool3d(3, 2, 1, ceil_mode=True),
        nn.GroupNorm(2, 8),
    )
    imported = import_model(network, example_inputs=(CLIPS,))
    arrays = random_inputs(imported.inputs)
    machine = relax.VirtualMachine(tvm.compile(imported.mod, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    found = machine["main"](*[tvm.runtime.tensor(array) for array in arrays.values()])
    for ours, expected in zip(found, imported.reference(arrays).values(), strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_values_can_be_asked_for_by_name(mini):
    (x,) = models.example_inputs("c3d-mini")
    values = interpreter.evaluate(mini.mod, {"x": x})
    with torch.inference_mode():
        torch.testing.assert_close(values["conv1"], models.create("c3d-mini").conv1(x))


# --- differences and what is not supported ---


def _smallest(node, importer):
    """What ``amax`` over the channels is not."""
    return importer.block_builder.emit(relax.op.min(importer.env[node.args[0]], [1], True))


def test_a_wrong_conversion_is_found_and_its_layer_named(monkeypatch):
    class Head(nn.Module):
        def forward(self, x):
            return x.amax(1, keepdim=True)

    network = nn.Sequential(nn.Conv3d(8, 8, 1), Head(), nn.Conv3d(1, 2, 1))
    import_model(network, example_inputs=(CLIPS,))
    monkeypatch.setitem(torch_conversions.CONVERSIONS, "amax.default", _smallest)
    with pytest.raises(DanceError, match="first at layer '1'"):
        import_model(network, example_inputs=(CLIPS,))


def test_operators_that_are_compiled_alone_take_part_in_float64():
    builder, shape = relax.BlockBuilder(), (2, 3, 4, 5)
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            both = builder.emit(relax.op.median(builder.emit(relax.op.negative(x)), [2], True))
            result = builder.emit_output(relax.Tuple([builder.emit(relax.TupleGetItem(both, 0))]))
        builder.emit_func_output(result)
    value = torch.randn(shape)
    (found,) = interpreter.outputs(builder.finalize(), {"x": value}, wide=True)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, (-value.double()).median(2, keepdim=True).values)


class Flat(nn.Module):
    """A norm of a constant volume where noise leaves the gate shut: its answer is rounding, magnified 300 times."""

    def __init__(self, norm, level, gate=9.0):
        super().__init__()
        torch.manual_seed(3)
        self.norm, self.level, self.gate = norm, level, gate
        for weight in norm.parameters():
            nn.init.normal_(weight, 0.5, 0.3)

    def forward(self, x):
        return self.norm((x + x.amax(1, keepdim=True)) * (x.mean() > self.gate).float() + self.level)


@pytest.mark.parametrize("level", [-100.0, 300.0, 33.3])
@pytest.mark.parametrize("norm", [nn.InstanceNorm3d(6, affine=True), nn.GroupNorm(2, 6), nn.LayerNorm([3, 5, 7])])
def test_rounding_that_a_norm_magnifies_is_no_difference(norm, level):
    import_model(Flat(norm, level), example_inputs=(torch.zeros(1, 6, 3, 5, 7),))


def test_a_wrong_conversion_is_found_behind_an_input_that_only_rounding_excuses(monkeypatch):
    monkeypatch.setitem(torch_conversions.CONVERSIONS, "amax.default", _smallest)
    shut_for_the_first_two = Flat(nn.InstanceNorm3d(6, affine=True), -100.0, gate=0.0)
    with pytest.raises(DanceError, match="first at layer"):
        import_model(shut_for_the_first_two, example_inputs=(torch.zeros(1, 6, 3, 5, 7),))


def test_an_unsupported_operator_is_named_with_its_layer():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    network = nn.Sequential()
    network.add_module("odd", Odd())
    with pytest.raises(DanceError, match=r"bessel_j0.* of layer 'odd' is not supported"):
        import_model(network, example_inputs=(CLIPS,))


def test_control_flow_that_follows_values_is_refused_with_what_to_do():
    both = Layer(lambda x: torch.cond(x.mean() > 0, lambda x: x + 1, lambda x: x - 1, (x,)))
    with pytest.raises(DanceError, match=r"follows a tensor's values \(cond\): .* torch\.where"):
        import_model(both, example_inputs=(CLIPS,))
    with pytest.raises(DanceError, match="output 0 of the network has a size that depends on values"):
        import_model(Layer(lambda x: x[x > 0]), example_inputs=(CLIPS,))


def test_a_module_needs_inputs():
    with pytest.raises(DanceError, match="example_inputs"):
        import_model(nn.Conv3d(8, 8, 1))
    with pytest.raises(DanceError, match=r"give \(tensor,\) for a single one"):  # its clips would be the inputs
        import_model(nn.Conv3d(8, 8, 1), example_inputs=CLIPS)


def test_a_program_takes_inputs_of_its_own_shapes_alone(tmp_path):
    program = torch.export.export(nn.Conv3d(8, 8, 1), (CLIPS,))
    imported = import_model(program, example_inputs=(CLIPS + 1,), check=False)
    for other in [(CLIPS[:1],), (CLIPS, CLIPS), ()]:
        with pytest.raises(DanceError, match="are not those of program, which takes input"):
            import_model(program, example_inputs=other, check=False)
    for late in ({"batch": 2}, {"weights": {}}, {"shapes": {"input": CLIPS.shape}}):
        with pytest.raises(DanceError, match="give them to import_model"):
            build_network(imported, tmp_path / "out", **late)


@pytest.mark.parametrize("trained", [(), ("0",), ("", "0"), ("", "0", "1")])
def test_each_part_of_a_module_keeps_its_mode(trained):
    network = nn.Sequential(nn.BatchNorm3d(8), nn.Dropout())
    for name, module in network.named_modules():
        module.training = name in trained
    import_model(network, example_inputs=(CLIPS,), check=False)
    assert tuple(name for name, module in network.named_modules() if module.training) == trained


# --- files ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "small.pt2"
    network = nn.Sequential(nn.Conv3d(8, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3))
    torch.export.save(torch.export.export(network.eval(), (CLIPS,)), path)
    return path


def test_a_program_file_is_imported(exported):
    imported = import_model(exported)
    assert imported.name == "small"
    assert [spec.shape for spec in imported.outputs] == [(2, 3)]
    assert {"0", "4"} <= set(_variables(imported.mod))


def test_weights_replace_those_of_a_program(exported, tmp_path):
    from safetensors.torch import save_file

    before = import_model(exported, check=False)
    program = torch.export.load(exported)
    save_file(
        {name: tensor.detach() * 2 for name, tensor in program.state_dict.items()}, tmp_path / "twice.safetensors"
    )
    after = import_model(exported, weights=tmp_path / "twice.safetensors")
    kept = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    import_model(program, weights=tmp_path / "twice.safetensors", check=False)
    assert all(torch.equal(program.state_dict[name], tensor) for name, tensor in kept.items())
    arrays = random_inputs(before.inputs)
    assert after.source_sha256 != before.source_sha256
    assert not np.allclose(*(next(iter(imported.reference(arrays).values())) for imported in (before, after)))


def test_wrong_weights_are_listed(exported, tmp_path):
    torch.save({"0.weight": torch.zeros(1), "other": torch.zeros(1)}, tmp_path / "weights.pt")
    expected = r"missing: 0\.bias, 4\.bias, 4\.weight; unexpected: other; wrong shape: 0\.weight"
    with pytest.raises(DanceError, match=expected):
        import_model(exported, weights=tmp_path / "weights.pt")


class _Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_in_place_of_weights_runs_nothing(exported, tmp_path):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    torch.save({"0.weight": _Bomb(tmp_path / "ran")}, tmp_path / "weights.pth")
    for name in ("weights.pt", "weights.pth"):
        with pytest.raises(DanceError, match=re.escape(name)):
            import_model(exported, weights=tmp_path / name)
    assert not (tmp_path / "ran").exists()


def _rewritten(source, target, change):
    """A copy of an archive with every member put through ``change(name, bytes)``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_pickles_inside_a_program_run_nothing(exported, tmp_path):
    bomb = io.BytesIO()
    torch.save((_Bomb(tmp_path / "ran"),), bomb)

    def sample_inputs(name, data):
        return bomb.getvalue() if "sample_inputs" in name else data

    def weights(name, data):
        if name.endswith("weights_config.json"):
            return data.replace(b'"use_pickle": false', b'"use_pickle": true').replace(
                b'"use_pickle":false', b'"use_pickle":true'
            )
        return bomb.getvalue() if "/weights/" in name else data

    for change in (sample_inputs, weights):
        path = _rewritten(exported, tmp_path / f"{change.__name__}.pt2", change)
        with pytest.raises(DanceError, match=re.escape(path.name)):
            import_model(path)
    assert not (tmp_path / "ran").exists()


def _with_member(source, target, name, data):
    shutil.copy(source, target)
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].split("/")[0]
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr(f"{root}/{name}", data)
    return target


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("data/aotinductor/model/code.so", "not part of an exported program"),
        ("models/model.jsoX", "not part of an exported program"),
        ("data/weights/legacy.pt", "pickled objects"),
        ("models/Model.json", "two members of the same name"),
    ],
)
def test_members_that_the_loader_would_run_or_misread_are_refused(exported, tmp_path, name, why):
    bomb = io.BytesIO()
    torch.save({"0.weight": _Bomb(tmp_path / "ran")}, bomb)
    path = _with_member(exported, tmp_path / "more.pt2", name, bomb.getvalue())
    with pytest.raises(DanceError, match=rf"more\.pt2 .*{why}"):
        import_model(path)
    assert not (tmp_path / "ran").exists()


def test_extra_files_beside_a_program_are_left_alone(exported, tmp_path):
    path = _with_member(exported, tmp_path / "notes.pt2", "extra/labels.json", b'{"target": "torch.hub.load"}')
    assert load_program(path).state_dict


def test_a_program_that_calls_other_functions_is_refused(exported, tmp_path):
    def change(name, data):
        return data.replace(b"torch.ops.aten.relu.default", b"torch.hub.load") if "/models/" in name else data

    path = _rewritten(exported, tmp_path / "calls.pt2", change)
    with pytest.raises(DanceError, match=r"torch\.hub\.load, which is not supported"):
        import_model(path)


def test_shapes_that_hold_code_are_refused(tmp_path):
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(nn.Conv3d(8, 8, 1), (CLIPS,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "dynamic.pt2")

    def change(name, data):
        return data.replace(b"Symbol('", b"print('") if "/models/" in name else data

    with pytest.raises(DanceError, match="has shapes that cannot be computed"):
        import_model(_rewritten(tmp_path / "dynamic.pt2", tmp_path / "code.pt2", change))


def test_damaged_and_foreign_files_are_one_sentence(exported, tmp_path):
    whole = exported.read_bytes()
    contents = {
        "cut.pt2": whole[: len(whole) // 2],
        "flipped.pt2": whole[:300] + bytes([whole[300] ^ 1]) + whole[301:],
        "text.pt2": b"hello",
        "empty.pt2": b"",
        "pickle.pt2": pickle.dumps(_Bomb(tmp_path / "ran")),
        "network.pt": b"",
        "network.txt": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DanceError, match=re.escape(name)):
            import_model(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "foreign.pt2", "w") as archive:
        archive.writestr("a", "b")
    for name in ("foreign.pt2", "missing.pt2", "missing.onnx"):
        with pytest.raises(DanceError, match=re.escape(name)):
            import_model(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_importing_the_frontend_does_not_need_onnx():
    code = "import sys; sys.modules['onnx'] = None; import dance_tvm.frontend"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
