"""ONNX imports: exports of PyTorch agree, layers keep their names, bad files end in one sentence."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

import onnx
from onnx import TensorProto, helper

from dance_tvm import models
from dance_tvm.core.errors import DanceError
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.frontend import import_model, interpreter, onnx_conversions, onnx_nodes


def export(network, x, path):
    torch.onnx.export(network.eval(), (x,), dynamo=True, verbose=False).save(str(path))
    return path


class Varied(nn.Module):
    """What ordinary video networks are made of, in one export."""

    def __init__(self):
        super().__init__()
        self.convolve = nn.Conv3d(4, 8, 3, padding=1, padding_mode="replicate")
        self.norm = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose3d(8, 4, 2, stride=2)
        self.pool = nn.AvgPool3d(3, 2, 1, count_include_pad=False)

    def forward(self, x):
        y = F.elu(self.norm(self.convolve(x)))
        masked = (
            y * (y.mean((2, 3, 4), keepdim=True) > 0).float() * torch.clamp(y.amax((1, 2), keepdim=True), 0, 1).ceil()
        )
        shifted = torch.cat([masked[:, :2, 1:], F.pad(masked[:, 2:4], (0, 0, 0, 0, -1, 0))], 1)
        bins = (x.flatten(1)[:, :9] * 2).long().clamp(0, 4)
        histogram = torch.zeros(1, 5).scatter_add(1, bins, x.flatten(1)[:, :9])
        return [
            F.silu(self.up(masked)),
            self.pool(shifted),
            histogram,
            F.hardswish(y) / y.std(),
            x.repeat(1, 2, 1, 1, 1),
        ]


def test_an_export_agrees_with_onnx_runtime_and_pytorch(tmp_path):
    torch.manual_seed(0)
    network, x = Varied(), torch.randn(1, 4, 4, 6, 6)
    imported = import_model(export(network, x, tmp_path / "varied.onnx"))
    found = interpreter.outputs(imported.mod, {imported.inputs[0].name: x})
    with torch.inference_mode():
        for ours, expected in zip(found, network(x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert [spec.shape for spec in imported.outputs] == [tuple(value.shape) for value in found]


def test_layers_keep_their_names(tmp_path):
    path = export(models.create("r2plus1d-mini"), *models.example_inputs("r2plus1d-mini"), tmp_path / "mini.onnx")
    mod = import_model(path).mod
    bindings = [binding for block in mod["main"].body.blocks for binding in block.bindings]
    convolutions = [b.var.name for b in bindings if "conv3d" in str(getattr(b.value, "op", ""))]
    ours = models.create("r2plus1d-mini").named_modules()
    assert sorted(convolutions) == sorted(name for name, layer in ours if isinstance(layer, nn.Conv3d))


def test_the_digest_covers_weights_kept_in_another_file(tmp_path):
    network, x = models.create("c3d-mini"), models.example_inputs("c3d-mini")
    program = torch.onnx.export(network, x, dynamo=True, verbose=False)
    program.save(str(tmp_path / "outside.onnx"), external_data=True)
    before = import_model(tmp_path / "outside.onnx").source_sha256
    (weights,) = [path for path in tmp_path.iterdir() if path.name != "outside.onnx"]
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    assert import_model(tmp_path / "outside.onnx").source_sha256 != before
    weights.unlink()
    with pytest.raises(DanceError, match=r"outside\.onnx"):
        import_model(tmp_path / "outside.onnx")


def test_the_digest_covers_constants_kept_in_another_file(tmp_path):
    constant = onnx.numpy_helper.from_array(np.ones(4, "float32"), "c")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], value=constant),
        onnx.helper.make_node("Mul", ["x", "c"], ["y"]),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y]))
    path, outside = tmp_path / "outside.onnx", {"location": "constants.bin", "size_threshold": 0}
    onnx.save(model, path, save_as_external_data=True, convert_attribute=True, **outside)
    before = import_model(path, check=False).source_sha256
    (tmp_path / "constants.bin").write_bytes(np.full(4, 2, "float32").tobytes())
    assert import_model(path, check=False).source_sha256 != before


def _save(path, nodes, *, shape=(1, 2, 3), out=("a", "b", "c"), opset=17, ir=9, weights=()):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir), path)
    return path


def test_shapes_computed_in_the_graph_are_folded(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"], name="/head/Reshape"),
    ]
    weights = [
        helper.make_tensor("first", TensorProto.INT64, [1], [0]),
        helper.make_tensor("rest", TensorProto.INT64, [1], [-1]),
    ]
    imported = import_model(_save(tmp_path / "flat.onnx", nodes, out=("a", "b"), weights=weights))
    assert imported.outputs[0].shape == (1, 6)
    arrays = random_inputs(imported.inputs)
    assert np.array_equal(imported.reference(arrays)["y"], arrays["x"].reshape(1, 6))


def test_a_file_too_new_for_onnx_runtime_is_checked_all_the_same(tmp_path):
    path = _save(tmp_path / "new.onnx", [helper.make_node("Relu", ["x"], ["y"])], ir=onnx.IR_VERSION)
    imported = import_model(path)
    arrays = random_inputs(imported.inputs)
    assert np.array_equal(imported.reference(arrays)["y"], np.maximum(arrays["x"], 0))


def test_names_of_older_exports_become_module_names():
    assert onnx_nodes.joined("/layer1/layer1.0/conv1/Conv") == "layer1.0.conv1"
    assert onnx_nodes.joined("/layer1/layer1.0/Relu") == "layer1.0.Relu"
    assert onnx_nodes.joined("Add_3") == "Add_3"


def test_a_wrong_conversion_is_found_and_its_layer_named(tmp_path, monkeypatch):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="/body/Relu"),
        helper.make_node("Clip", ["a", "low", "high"], ["b"], name="/head/Clip"),
        helper.make_node("Exp", ["b"], ["y"], name="/head/Exp"),
    ]
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [], [v]) for name, v in (("low", 0.1), ("high", 0.2))]
    path = _save(tmp_path / "clipped.onnx", nodes, weights=weights)
    import_model(path)
    monkeypatch.setitem(onnx_conversions.CONVERSIONS, "Clip", lambda op: op.input(0))
    with pytest.raises(DanceError, match=r"first at layer 'head\.(Clip|Exp)'"):
        import_model(path)


def test_what_is_not_supported_is_named(tmp_path):
    cases = {
        "Bernoulli.*'random.Bernoulli'": _save(
            tmp_path / "random.onnx", [helper.make_node("Bernoulli", ["x"], ["y"], name="/random/Bernoulli")]
        ),
        r"dynamic shape \(batch, 2\)": _save(
            tmp_path / "dynamic.onnx", [helper.make_node("Relu", ["x"], ["y"])], shape=("batch", 2)
        ),
        "opset 5": _save(tmp_path / "old.onnx", [helper.make_node("Relu", ["x"], ["y"])], opset=5),
    }
    for message, path in cases.items():
        with pytest.raises(DanceError, match=message):
            import_model(path)


def test_damaged_and_foreign_files_are_one_sentence(tmp_path):
    whole = _save(tmp_path / "whole.onnx", [helper.make_node("Relu", ["x"], ["y"])]).read_bytes()
    for name, data in {"cut.onnx": whole[:-20], "text.onnx": b"hello", "empty.onnx": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DanceError, match=re.escape(name)):
            import_model(tmp_path / name)


def _wider_kernel(model):
    attribute = next(each for each in model.graph.node[0].attribute if each.name == "kernel_shape")
    attribute.ints[0] = 115


def _shorter_weights(model):
    weights = model.graph.initializer[0]
    weights.raw_data = weights.raw_data[:-4]
    weights.data_type = TensorProto.BFLOAT16


DAMAGES = {
    "tensor": (_shorter_weights, "tensor 'w' does not have as many"),
    "type": (lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", 77), "'x' of the network holds"),
    "window": (_wider_kernel, r"kernel_shape \[115, 1, 2\] and weights of \[2, 1, 2\]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_the_standards_checker_lets_pass_is_refused_all_the_same(damage, tmp_path):
    change, told = DAMAGES[damage]
    conv = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[2, 1, 2])
    value = helper.make_tensor_value_info
    weights = onnx.numpy_helper.from_array(np.ones((4, 2, 2, 1, 2), np.float32), "w")
    graph = helper.make_graph(
        [conv],
        "graph",
        [value("x", TensorProto.FLOAT, [1, 2, 4, 4, 4])],
        [value("y", TensorProto.FLOAT, None)],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    change(model)
    (tmp_path / "damaged.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DanceError, match=told):
        import_model(tmp_path / "damaged.onnx")


def test_a_state_that_forward_changes_is_as_in_the_first_call(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.5, -1.0]))

        def forward(self, x):
            self.mean.mul_(0.9).add_(x.mean((0, 2, 3, 4)), alpha=0.1)
            return x - self.mean.view(1, 2, 1, 1, 1)

    x = torch.randn(1, 2, 3, 5, 4)
    torch.onnx.export(Counting(), (x,), tmp_path / "state.onnx", dynamo=True, verbose=False)
    imported = import_model(tmp_path / "state.onnx")
    (found,) = interpreter.outputs(imported.mod, {imported.inputs[0].name: x.numpy()})
    torch.testing.assert_close(torch.as_tensor(found), Counting()(x))


def test_weights_cannot_be_given_to_an_onnx_file(tmp_path):
    path = _save(tmp_path / "whole.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    with pytest.raises(DanceError, match="carries its weights"):
        import_model(path, weights=tmp_path / "weights.pt")
