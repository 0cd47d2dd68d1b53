"""ONNX operators in their forms: each small graph imports, and equals ONNX Runtime or the standard's own cases."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper, numpy_helper

from dance_tvm import DanceError, build_network, import_model, open_device
from dance_tvm.frontend import interpreter

FLOAT, BYTE = TensorProto.FLOAT, TensorProto.UINT8
node = helper.make_node


def save(path, nodes, inputs, outputs, weights=None, *, opset=17, functions=(), producer=""):
    """inputs, outputs: name to shape, or to (shape, type)."""

    def values(named):
        told = {name: value if isinstance(value, tuple) else (value, FLOAT) for name, value in named.items()}
        return [helper.make_tensor_value_info(name, kind, shape) for name, (shape, kind) in told.items()]

    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", values(inputs), values(outputs), arrays)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("mine", 1)] if functions else ())]
    facts = {"ir_version": 9, "functions": functions, "producer_name": producer}
    onnx.save(helper.make_model(graph, opset_imports=opsets, **facts), path)
    return path


def pool_bytes():
    pool = node("MaxPool", ["x"], ["y"], kernel_shape=[2, 1, 3], strides=[1, 1, 2], pads=[0, 0, 1, 0, 0, 1])
    return [pool], {"x": ([1, 2, 3, 4, 7], BYTE)}, {"y": (None, BYTE)}


def old_attributes():
    nodes = [
        node("Pad", ["x"], ["a"], mode="reflect", pads=[0, 0, 1, 0, 0, 2]),
        node("Clip", ["a"], ["b"], min=-0.5, max=0.75),
        node("ReduceMean", ["b"], ["c"], axes=[1], keepdims=0),
        node("Unsqueeze", ["c"], ["d"], axes=[0, 3]),
        node("Softmax", ["d"], ["y"], axis=2),
    ]
    return nodes, {"x": [2, 3, 5]}, {"y": None}, {}, 10


def computed_pads():
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "last"], ["extent"]),
        node("Mod", ["extent", "four"], ["missing"]),
        node("Concat", ["zeros", "missing"], ["pads"], axis=0),
        node("Pad", ["x", "pads"], ["y"]),
    ]
    weights = {"last": np.array([2]), "four": np.array([4]), "zeros": np.zeros(5, np.int64)}
    return nodes, {"x": [1, 2, 7]}, {"y": None}, weights


def loop():
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Mul", ["s", "half"], ["t"]), node("Identity", ["on"], ["on2"]), node("Identity", ["t"], ["kept"])],
        "body",
        [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("s", FLOAT, [2, 3])],
        [value("on2", TensorProto.BOOL, []), value("t", FLOAT, [2, 3]), value("kept", FLOAT, [2, 3])],
    )
    weights = {"count": np.array(4), "yes": np.array(True), "half": np.float32(0.5)}
    return (
        [node("Loop", ["count", "yes", "x"], ["y", "all"], body=body)],
        {"x": [2, 3]},
        {"y": None, "all": None},
        weights,
    )


def branches():
    value = helper.make_tensor_value_info
    one, other = (
        helper.make_graph([node(kind, ["x"], [kind])], kind, [], [value(kind, FLOAT, [3, 2])])
        for kind in ("Neg", "Exp")
    )
    nodes = [
        node("ReduceSum", ["x"], ["total"], keepdims=0),
        node("Greater", ["total", "zero"], ["above"]),
        node("If", ["above"], ["y"], then_branch=one, else_branch=other),
    ]
    return nodes, {"x": [3, 2]}, {"y": None}, {"zero": np.float32(0)}


def resized(**attributes):
    return lambda: (
        [node("Resize", ["x", "", "", "sizes"], ["y"], axes=[3, 2], **attributes)],
        {"x": [1, 2, 4, 5]},
        {"y": None},
        {"sizes": np.array([7, 3])},
        18,
    )


def transposed():
    convolution = node(
        "ConvTranspose", ["x", "w"], ["y"], strides=[3, 2], dilations=[1, 2], output_shape=[14, 10], group=2
    )
    rng = np.random.default_rng(0)
    return [convolution], {"x": [1, 4, 5, 4]}, {"y": None}, {"w": rng.standard_normal((4, 3, 2, 3)).astype("f")}


def average():
    pool = node(
        "AveragePool", ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 0, 1], ceil_mode=1,
        count_include_pad=1,
    )  # fmt: skip
    return [pool], {"x": [1, 2, 6, 6]}, {"y": None}, {}, 19


def quantized():
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "t", "u"], ["v"], axis=1),
        node("MatMul", ["d", "v"], ["p"]),
        node("QuantizeLinear", ["p", "o", "z"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    weights = {"s": np.float32(0.03), "z": np.uint8(120), "w": rng.integers(-90, 90, (6, 3)).astype("int8")}
    scales = {"t": np.array([0.01, 0.02, 0.03], "f"), "u": np.zeros(3, "int8"), "o": np.float32(0.05)}
    return nodes, {"x": [4, 6]}, {"y": (None, BYTE)}, {**weights, **scales}


def mirrored():
    nodes = [
        node("Pad", ["x", "rows"], ["a"], mode="reflect"),
        node("Pad", ["a", "columns"], ["y"], mode="edge"),
    ]
    amounts = {"rows": np.array([0, 0, 0, 1, 2, 0, 0, 0, 2, 1]), "columns": np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 3])}
    return nodes, {"x": [1, 2, 3, 4, 5]}, {"y": None}, amounts


GRAPHS = {
    "mirrored along some axes": mirrored,
    "pool of bytes": pool_bytes,
    "attributes of opset 10": old_attributes,
    "computed pads": computed_pads,
    "loop": loop,
    "branches": branches,
    "cubic": resized(mode="cubic", coordinate_transformation_mode="half_pixel"),
    "linear": resized(mode="linear", coordinate_transformation_mode="asymmetric"),
    "nearest": resized(mode="nearest", nearest_mode="ceil"),
    "transposed": transposed,
    "average": average,
    "quantized": quantized,
    "nothing split": lambda: ([node("Split", ["x", "s"], ["y"])], {"x": [4, 2]}, {"y": None}, {"s": np.array([4])}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_form_of_an_operator_imports(tmp_path, name):
    nodes, inputs, outputs, *rest = GRAPHS[name]()
    path = save(tmp_path / "graph.onnx", nodes, inputs, outputs, *rest[:1], opset=rest[1] if len(rest) > 1 else 17)
    assert import_model(path).outputs  # the import's own check compares with ONNX Runtime


def test_a_local_function_is_entered(tmp_path):
    scale = node("Constant", [], ["by"])
    scale.attribute.add(name="value_float", ref_attr_name="factor", type=onnx.AttributeProto.FLOAT)
    body = [scale, node("Mul", ["a", "by"], ["b"])]
    function = helper.make_function("mine", "Scaled", ["a"], ["b"], body, [helper.make_opsetid("", 17)], ["factor"])
    nodes = [node("Scaled", ["x"], ["y"], domain="mine", factor=3.0)]
    imported = import_model(save(tmp_path / "f.onnx", nodes, {"x": [2, 2]}, {"y": [2, 2]}, functions=[function]))
    (found,) = interpreter.outputs(imported.mod, {"x": np.ones((2, 2), np.float32)})
    assert found.tolist() == [[3, 3], [3, 3]]


def test_sparse_weights_and_half_precision_and_open_shapes(tmp_path):
    path = save(
        tmp_path / "g.onnx",
        [node("MatMul", ["x", "w"], ["p"]), node("CastLike", ["p", "x"], ["y"])],
        {"x": (["batch", 5], TensorProto.FLOAT16)},
        {"y": (["batch", 2], TensorProto.FLOAT16)},
    )
    model = onnx.load(path)
    sparse = model.graph.sparse_initializer.add(dims=[5, 2])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([2, -1], np.float16), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([1, 8]), "places"))
    onnx.save(model, path)
    with pytest.raises(DanceError, match="--shape x="):
        import_model(path)
    imported = import_model(path, shapes={"x": (3, 5)}, check=False)
    assert (imported.outputs[0].shape, imported.outputs[0].dtype) == ((3, 2), "float16")
    (found,) = interpreter.outputs(imported.mod, {"x": np.arange(15, dtype=np.float16).reshape(3, 5)})
    assert found.tolist() == [[-4, 0], [-9, 10], [-14, 20]]


def test_what_depends_on_values_is_refused_in_a_sentence(tmp_path):
    for nodes, told in (
        ([node("NonZero", ["x"], ["y"])], "NonZero of layer 'y' has a result whose size depends"),
        ([node("Reshape", ["x", "n"], ["y"])], "has a shape that depend on the input: make them constants"),
    ):
        inputs = {"x": [2, 2], "n": ([1], TensorProto.INT64)}
        path = save(
            tmp_path / "v.onnx", nodes, inputs, {"y": (None, TensorProto.INT64 if len(nodes[0].input) == 1 else FLOAT)}
        )
        with pytest.raises(DanceError, match=told):
            import_model(path)


def test_a_slope_for_each_channel_behind_a_convolution_builds(tmp_path):
    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_normal((6, 3, 1, 3, 3)).astype("f"), "s": rng.random((6, 1, 1, 1)).astype("f")}
    nodes = [
        node("Conv", ["x", "w"], ["c"], auto_pad="SAME_LOWER", strides=[1, 2, 2]),
        node("PRelu", ["c", "s"], ["y"]),
    ]
    path = save(tmp_path / "p.onnx", nodes, {"x": [1, 3, 2, 6, 5]}, {"y": None}, weights)
    built = build_network(path, tmp_path / "artifact", threads=1)
    assert built.artifact.manifest.check.status == "passed"


def test_maxima_of_infinities_are_infinite(tmp_path):
    nodes = [node("ReduceMax", ["x"], ["high"], axes=[1]), node("ReduceMin", ["x"], ["low"], axes=[1])]
    path = save(tmp_path / "m.onnx", nodes, {"x": [3, 2]}, {"high": [3, 1], "low": [3, 1]})
    built = build_network(path, tmp_path / "artifact", threads=1, check=False)
    rows = np.array([[-np.inf, -np.inf], [np.inf, np.inf], [1, np.nan]], np.float32)
    with open_device("local") as device:
        found = device.load(built.artifact).run({"x": rows})
    for array in found.values():
        np.testing.assert_array_equal(array[:, 0], [-np.inf, np.inf, np.nan])


def test_fractional_scales_pick_what_onnx_runtime_picks(tmp_path):
    """Elements that lie between two in float32, and the ends of align_corners where sizes are cut to whole numbers."""
    import onnxruntime

    rows, nodes = {"nearest": ["floor", "round_prefer_ceil"], "linear": ["floor"], "cubic": ["floor"]}, []
    for mode, roundings in rows.items():
        for transform in ("half_pixel", "asymmetric", "align_corners"):
            given = {"mode": mode, "coordinate_transformation_mode": transform}
            nodes += [node("Resize", ["x", "", "s"], [""], nearest_mode=rounding, **given) for rounding in roundings]
    given = {"coordinate_transformation_mode": "half_pixel_symmetric", "nearest_mode": "ceil"}
    nodes += [node("Resize", ["x", "", *named], [""], **given) for named in (["s"], ["", "z"])]
    for at, each in enumerate(nodes):
        each.output[0] = f"y{at}"
    weights = {"s": np.array([1, 1, 1.7, 0.6], np.float32), "z": np.array([1, 2, 11, 5])}
    outputs = {each.output[0]: None for each in nodes}
    given = (nodes, {"x": [1, 2, 7, 9]}, outputs, weights)
    with pytest.raises(DanceError, match="align_corners and scales that give no whole sizes"):
        import_model(save(tmp_path / "other.onnx", *given, opset=19))
    path = save(tmp_path / "r.onnx", *given, opset=19, producer="pytorch")
    x = np.random.default_rng(3).standard_normal((1, 2, 7, 9)).astype("f")
    wanted = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    built = build_network(path, tmp_path / "artifact", threads=1, check=False)
    with open_device("local") as device:
        found = device.load(built.artifact).run({"x": x}).values()
    for each, got, value in zip(nodes, found, wanted, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5, err_msg=str(each))


SAMPLE = (
    *(
        "test_attention_4d_causal",
        "test_center_crop_pad_crop_and_pad",
        "test_col2im_pads",
        "test_gathernd_example_float32",
    ),
    *("test_maxpool_with_argmax_2d_precomputed_pads", "test_qlinearmatmul_2D_uint8_float32", "test_scatternd_max"),
    *(
        "test_resize_downsample_sizes_nearest_not_larger",
        "test_rotary_embedding_interleaved",
        "test_top_k_negative_axis",
    ),
)


def test_crossed_bounds_give_the_upper_one_and_nan_has_no_sign(tmp_path):
    nodes = [node("Clip", ["x", "low", "high"], ["y"]), node("Sign", ["x"], ["sign"])]
    bounds = {"low": np.float32(2), "high": np.float32(-1)}
    path = save(tmp_path / "n.onnx", nodes, {"x": [4]}, {"y": None, "sign": None}, bounds)
    built = build_network(path, tmp_path / "built", threads=1, check=False)
    with open_device("local") as device:
        found = device.load(built.artifact).run({"x": np.array([-3, 0, np.nan, 5], np.float32)})
    np.testing.assert_array_equal(found["y"], [-1, -1, np.nan, -1])
    np.testing.assert_array_equal(found["sign"], [-1, 0, np.nan, 1])


@pytest.mark.parametrize("case", SAMPLE)
def test_a_sample_of_the_standards_own_cases(tmp_path, case):
    from benchmarks.conformance import onnx_backend

    onnx_backend.attempt(case, tmp_path, False)


def test_a_file_in_float64_without_the_import(tmp_path):
    random, asymmetric = np.random.default_rng(8), {"coordinate_transformation_mode": "asymmetric"}
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], pads=[1, 0, 2, 0, 1, 0], strides=[1, 2, 1], dilations=[1, 1, 2]),
        node("MaxPool", ["a"], ["c"], kernel_shape=[2, 2, 2], pads=[0, 1, 0, 1, 0, 0], strides=[1, 2, 1]),
        node("ConvTranspose", ["c", "v"], ["d"], strides=[2, 1, 2], pads=[1, 0, 0, 0, 0, 1], output_padding=[1, 0, 0]),
        node("InstanceNormalization", ["d", "s", "s"], ["e"], epsilon=1e-4),
        node("Resize", ["e", "", "twice"], ["f"], mode="nearest", nearest_mode="round_prefer_floor"),
        node("Resize", ["f", "", "", "size"], ["y"], mode="nearest", nearest_mode="floor", **asymmetric),
    ]
    weights = {
        "twice": np.array([1, 1, 3, 1, 2], np.float32),
        "size": np.array([1, 2, 25, 4, 60]),
        "w": random.normal(size=(4, 2, 3, 2, 2)).astype("float32"),
        "b": random.normal(size=4).astype("float32"),
        "v": random.normal(size=(4, 2, 2, 1, 3)).astype("float32"),
        "s": random.normal(size=2).astype("float32"),
    }
    path = save(tmp_path / "g.onnx", nodes, {"x": [1, 2, 5, 6, 7]}, {"y": None}, weights)
    imported = import_model(path)
    arrays = {"x": random.normal(size=(1, 2, 5, 6, 7)).astype("float32")}
    (exact,) = imported.exact(arrays)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(imported.reference(arrays)["y"], exact, rtol=1e-4, atol=1e-5)


def test_a_file_that_the_reference_would_take_long_for_has_no_float64(tmp_path):
    nodes = [node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2, 2])]
    path = save(tmp_path / "g.onnx", nodes, {"x": [1, 2, 5, 6, 7]}, {"y": None})
    assert import_model(path).exact({"x": np.zeros((1, 2, 5, 6, 7), np.float32)}) is None
