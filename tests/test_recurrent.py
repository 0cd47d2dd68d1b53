"""Recurrent layers, as video classifiers have them behind their convolutions, from both kinds of files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper, numpy_helper

from dance_tvm import DanceError, build_network, import_model, open_device
from dance_tvm.frontend import interpreter

STEPS, BATCH, WIDTH, HIDDEN = 4, 3, 5, 2
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def layer(path, kind, inputs=(), outputs=("Y", "Y_h"), ways=1, **attributes):
    """A file of one layer with random weights; ``inputs`` are those behind the biases that it has, by name."""
    rng, gates = np.random.default_rng(3), GATES[kind] * HIDDEN
    shapes = {"W": (ways, gates, WIDTH), "R": (ways, gates, HIDDEN), "B": (ways, 2 * gates), "P": (ways, 3 * HIDDEN)}
    weights = {name: rng.standard_normal(shape).astype("f") for name, shape in shapes.items()}
    given = {"X": (TensorProto.FLOAT, (STEPS, BATCH, WIDTH)), "lengths": (TensorProto.INT32, (BATCH,))}
    given.update(dict.fromkeys(("h", "c"), (TensorProto.FLOAT, (ways, BATCH, HIDDEN))))
    names = ["X", "W", "R", "B", *(name if name in inputs else "" for name in ("lengths", "h", "c", "P"))]
    names = names[: 6 if kind != "LSTM" else 8]
    node = helper.make_node(kind, names, list(outputs), hidden_size=HIDDEN, **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, *given[name]) for name in names if name in given],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items() if name in names],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


FORMS = {
    "relu, backwards": ("RNN", {"direction": "reverse", "activations": ["Relu"]}),
    "two ways, lengths": ("RNN", {"direction": "bidirectional", "ways": 2, "inputs": ("lengths", "h")}),
    "reset before": ("GRU", {"inputs": ("h",)}),
    "reset behind, two ways, lengths": (
        "GRU",
        {"linear_before_reset": 1, "direction": "bidirectional", "ways": 2, "inputs": ("lengths",)},
    ),
    "activations with factors": (
        "GRU",
        {"activations": ["HardSigmoid", "ScaledTanh"], "activation_alpha": [0.3, 1.5], "activation_beta": [0.4, 0.7]},
    ),
    "states, peepholes": ("LSTM", {"inputs": ("h", "c", "P"), "outputs": ("Y", "Y_h", "Y_c")}),
    "clipped, two ways, lengths": (
        "LSTM",
        {"clip": 0.6, "direction": "bidirectional", "ways": 2, "inputs": ("lengths",), "outputs": ("Y", "Y_h", "Y_c")},
    ),
    "input and forget gate in one": ("LSTM", {"input_forget": 1, "activations": ["Sigmoid", "Softsign", "Elu"]}),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_a_recurrent_layer_equals_onnx_runtime(tmp_path, name):
    kind, form = FORMS[name]
    imported = import_model(layer(tmp_path / "layer.onnx", kind, **form))  # the import's own check compares
    kinds = {spec.name: spec.shape for spec in imported.outputs}
    assert kinds["Y"] == (STEPS, form.get("ways", 1), BATCH, HIDDEN)
    assert kinds["Y_h"] == (form.get("ways", 1), BATCH, HIDDEN)


def test_sequences_that_end_early_or_are_empty(tmp_path):
    path = layer(tmp_path / "gru.onnx", "GRU", ("lengths", "h"), direction="reverse")
    imported, rng = import_model(path), np.random.default_rng(0)
    x, h = (rng.standard_normal(shape).astype("f") for shape in ((STEPS, BATCH, WIDTH), (1, BATCH, HIDDEN)))
    arrays = {"X": x, "lengths": np.array([4, 2, 0], np.int32), "h": h}
    wanted = list(imported.reference(arrays).values())
    for found, value in zip(interpreter.outputs(imported.mod, arrays), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
    assert not wanted[0][2:, 0, 1].any()
    assert wanted[0][:2, 0, 1].all()
    assert not wanted[1][0, 2].any()


def test_an_activation_that_nobody_knows_is_named(tmp_path):
    path = layer(tmp_path / "rnn.onnx", "RNN", activations=["Sine"])
    with pytest.raises(DanceError, match="RNN of layer 'Y' is not supported with the activation Sine"):
        import_model(path)


class Recurrent(nn.Module):
    """Frames through a convolution, then a recurrent layer, then a class."""

    def __init__(self, cells: nn.Module, width: int) -> None:
        super().__init__()
        self.frames = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))
        self.cells, self.classes = cells, nn.Linear(width, 3)

    def forward(self, clip):
        rows = self.frames(clip).relu().mean((3, 4)).transpose(1, 2)
        return self.classes(self.cells(rows)[0])


CELLS = {
    "lstm": (lambda: nn.LSTM(4, 6, 2, batch_first=True, dropout=0.5), 6),
    "two ways": (lambda: nn.LSTM(4, 5, batch_first=True, bidirectional=True), 10),
    "gru": (lambda: nn.GRU(4, 6, batch_first=True), 6),
    "rnn": (lambda: nn.RNN(4, 6, batch_first=True, nonlinearity="relu"), 6),
}


@pytest.mark.parametrize(
    ("name", "dynamo"), [("lstm", True), ("gru", True), *((name, False) for name in CELLS)], ids=str
)
def test_frames_through_a_recurrent_layer_from_onnx(tmp_path, name, dynamo):
    torch.manual_seed(0)
    cells, width = CELLS[name]
    network, clip = Recurrent(cells(), width).eval(), torch.randn(2, 3, 5, 6, 7)
    torch.onnx.export(network, (clip,), tmp_path / "clip.onnx", dynamo=dynamo, verbose=False)
    imported = import_model(tmp_path / "clip.onnx")
    (spec,) = imported.inputs
    (found,) = interpreter.outputs(imported.mod, {spec.name: clip.numpy()})
    np.testing.assert_allclose(found, network(clip).detach(), rtol=1e-4, atol=1e-5)


class Forms(nn.Module):
    """Every form of PyTorch's recurrent layers in one program."""

    def __init__(self) -> None:
        super().__init__()
        self.projected = nn.LSTM(5, 6, proj_size=3, bidirectional=True)
        self.stack = nn.GRU(6, 4, num_layers=2, bias=False)
        self.frames = nn.RNN(4, 3, bidirectional=True, batch_first=True)
        self.cell = nn.LSTMCell(6, 2)

    def forward(self, x, h):
        y, (last, _) = self.projected(x)
        y, _ = self.stack(y, h)
        y, ends = self.frames(y.transpose(0, 1))
        return y, ends, last, self.cell(y[:, 0])[1]


def test_pytorchs_recurrent_layers_build(tmp_path):
    torch.manual_seed(1)
    network, arguments = Forms().eval(), (torch.randn(3, 2, 5), torch.randn(2, 2, 4))
    torch.export.save(torch.export.export(network, arguments), tmp_path / "forms.pt2")
    built = build_network(tmp_path / "forms.pt2", tmp_path / "artifact", threads=1)
    assert built.artifact.manifest.check.status == "passed"
    with open_device("local") as device:
        found = device.load(built.artifact).run({"x": arguments[0].numpy(), "h": arguments[1].numpy()})
    for array, wanted in zip(found.values(), network(*arguments), strict=True):
        np.testing.assert_allclose(array, wanted.detach(), rtol=1e-4, atol=1e-5)
