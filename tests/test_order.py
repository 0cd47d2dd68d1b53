"""Values in order: as PyTorch orders them, NaN counted as the largest, equal ones in the order in which they stood."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from dance_tvm import DanceError, build_network, import_model, open_device
from dance_tvm.compiler.pipeline import Options, lower
from dance_tvm.device.opencl import OpenCLSession
from dance_tvm.device.opencl_network import OpenCLNetwork
from dance_tvm.machines.target import load_target
from dance_tvm.schedules.cpu.places import PlaceOfExtreme
from dance_tvm.schedules.cpu.sort import MergeSort
from tests.test_transform import outputs

NAN, INF = float("nan"), float("inf")


def odd(*shape: int) -> torch.Tensor:
    """Different numbers, some of them NaN (the first and the last of a line too) and infinities."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    x[0, 0] = torch.tensor([NAN, 3.0, -INF, 0.5, NAN, INF])
    x[1, 2] = -INF
    x[1, 1, 5] = x[0, 3, 2] = NAN
    return x


def tied(x: torch.Tensor) -> torch.Tensor:
    """Many equal values."""
    return (x * 2).round() / 2


Results = list[torch.Tensor]
OPERATORS: dict[str, Callable[[torch.Tensor], Results]] = {
    "ascending": lambda x: [*x.sort(dim=1, stable=True)],
    "descending": lambda x: [*x.sort(dim=-1, descending=True, stable=True)],
    "equal values stay": lambda x: [
        *tied(x).sort(dim=2, stable=True),
        *tied(x).sort(dim=2, descending=True, stable=True),
    ],
    "places": lambda x: [x.argsort(dim=0, stable=True), torch.argsort(tied(x), dim=1, descending=True, stable=True)],
    "rows": lambda x: [x.msort()],
    "largest": lambda x: [x.topk(2, 1)[0], x.topk(1, 0)[1]],
    "smallest": lambda x: [*x.topk(3, 1, largest=False), x.topk(4, 2, largest=False)[0]],
    "the second": lambda x: [*x.kthvalue(2, 1), x.kthvalue(3, keepdim=True)[0]],
    "medians": lambda x: [*x.median(1), *x.median(2, keepdim=True), x.median()],
    "medians of numbers": lambda x: [x.nanmedian(2)[0], x.nanmedian()],
    "quantiles": lambda x: [x.quantile(0.4, 1), x.nan_to_num(0, 9, -9).quantile(0.4, 1), x.nanquantile(0.7, 2)],
    "place of the largest": lambda x: [x.argmax(1), x.argmax(-1, keepdim=True), x.argmax(), tied(x).argmax(2)],
    "place of the smallest": lambda x: [x.argmin(1), x.argmin(-1, keepdim=True), (-tied(x)).argmin(2)],
    "extremes with places": lambda x: [*x.max(1), *x.min(2, keepdim=True)],
    "running extremes": lambda x: [*x.cummax(1), *x.cummin(2)],
    "integers": lambda x: [*x.nan_to_num(0, 9, -9).mul(9).int().sort(dim=2, stable=True)],
    "truth values": lambda x: [*(x > 0).sort(dim=2, stable=True), (x > 0).byte().argmax(2)],
    "scalars": lambda x: [*x.amax().sort(), *x.amin().topk(1), x.amin().argmax(), x.amax().median()],
    "pooled with places": lambda x: [
        *nn.functional.max_pool1d(x, 3, 2, 1, return_indices=True),
        *nn.functional.adaptive_max_pool1d(x, 4, return_indices=True),
        *nn.functional.max_pool2d(x.unflatten(1, (2, 2)), (2, 3), 1, 1, return_indices=True),
    ],
}


class All(nn.Module):
    def forward(self, x: torch.Tensor) -> Results:
        return [part for operator in OPERATORS.values() for part in operator(x)]


def test_operators_that_order_agree_with_pytorch_on_nan_infinities_and_equal_values() -> None:
    x = odd(2, 4, 6)
    usual = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(4))
    low = lower(import_model(All().eval(), example_inputs=(usual,)).mod, load_target("host"), Options(threads=2))
    assert "contrib.sort" not in low.mod.script(), "TVM's own calls a library that a C program does not have"
    machine = relax.VirtualMachine(tvm.compile(low.mod, target=load_target("host").tvm_target(2)), tvm.cpu())
    for given in (usual, x):
        found = iter(outputs(machine, given))
        for name, operator in OPERATORS.items():
            for part in operator(given):
                value = next(found)
                assert value.dtype == part.numpy().dtype, name
                np.testing.assert_allclose(value, part.numpy(), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool"])
@pytest.mark.parametrize("descending", [False, True], ids=["up", "down"])
def test_the_kernel_sorts_lines_of_every_length(dtype: str, descending: bool) -> None:
    generator = np.random.default_rng(0)
    functions, cases = {}, {}
    for extent in (1, 3, 4, 7, 64, 299, 300):
        x = generator.integers(0, extent + 2, (2, extent, 3)).astype(dtype)
        if dtype.startswith("float"):
            x[generator.random(x.shape) < 0.2] = np.nan
        kept = {300: 225, 299: 7, 64: 16, 4: 1}.get(extent, extent)
        kernel = MergeSort(x.shape, 1, kept, descending, dtype, True, "int32")
        functions[f"sort{extent}"] = kernel.primfunc(f"sort{extent}", one_thread=True)
        cases[f"sort{extent}"] = (x, kept)
    built = tvm.compile(tvm.IRModule(functions), target=load_target("host").tvm_target(1))
    for name, (x, kept) in cases.items():
        values, places = (tvm.runtime.empty((2, kept, 3), kind) for kind in (dtype, "int32"))
        built[name](tvm.runtime.tensor(x), values, places)
        wanted = torch.sort(torch.from_numpy(x), dim=1, descending=descending, stable=True)
        np.testing.assert_array_equal(places.numpy(), wanted[1][:, :kept].numpy())
        np.testing.assert_array_equal(values.numpy(), wanted[0][:, :kept].numpy())


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "least"])
def test_the_kernel_finds_the_first_place_along_lines_and_lanes(largest: bool) -> None:
    generator = np.random.default_rng(1)
    functions, cases = {}, {}
    for outer, reduced, inner in ((2, 1, 3), (3, 7, 1), (2, 40, 1), (1, 163, 1), (2, 5, 37), (3, 9, 1030)):
        for kind in ("usual", "tied", "with NaN", "infinite"):
            x = generator.standard_normal((outer, reduced, inner), "float32")
            x = x if kind == "usual" else x.round()
            if kind == "with NaN":
                x[generator.random(x.shape) < 0.1] = np.nan
            if kind == "infinite":
                x = np.where(x > 0, np.inf, -np.inf).astype("float32")
            name = f"place{len(cases)}"
            statistic = "max" if largest else "min"
            kernel = PlaceOfExtreme(x.shape, (outer, inner), outer, reduced, inner, statistic, vector_floats=16)
            functions[name] = kernel.primfunc(name, one_thread=True)
            cases[name] = x
    built = tvm.compile(tvm.IRModule(functions), target=load_target("host").tvm_target(1))
    for name, x in cases.items():
        places = tvm.runtime.empty((x.shape[0], x.shape[2]), "int64")
        built[name](tvm.runtime.tensor(x), places)
        wanted = torch.argmax if largest else torch.argmin
        np.testing.assert_array_equal(places.numpy(), wanted(torch.from_numpy(x), 1).numpy(), err_msg=str(x.shape))


def test_places_of_equal_values_are_compared_in_one_order() -> None:
    """PyTorch's own order of 3,000 values of which many are equal is any: the import's check must not refuse it."""

    class Places(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = tied(x)
            return (
                y.argsort(),
                *y.topk(40),
                y.sort(descending=True)[1],
                y.kthvalue(1500)[1],
                y.topk(9, largest=False)[1],
            )

    x = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    imported = import_model(Places().eval(), example_inputs=(x,))
    found = list(imported.reference({imported.inputs[0].name: x.numpy()}).values())
    np.testing.assert_array_equal(found[0], tied(x).argsort(stable=True).numpy())
    np.testing.assert_array_equal(found[2], tied(x).argsort(stable=True, descending=True)[:40].numpy())


class Ranked(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = tied(x)
        return (
            x.sort(1)[0],
            x.topk(2, 2)[0],
            x.argmax(1),
            y.sort(dim=2, descending=True, stable=True)[1],
            x.median(1)[0],
        )


def test_a_gpu_orders_alike() -> None:
    try:
        device = OpenCLSession(optimise=False, emulate_half=True)
    except DanceError as error:
        pytest.skip(str(error))
    x = odd(2, 4, 6)
    imported = import_model(Ranked().eval(), example_inputs=(x.nan_to_num(0, 9, -9),))
    network = OpenCLNetwork(device, lower(imported.mod, load_target("jetson-nano"), Options()))
    for found, part in zip(network.run([x.numpy()]), Ranked()(x), strict=True):
        np.testing.assert_array_equal(found, part.numpy())


def test_lines_too_long_for_a_gpu_are_refused_in_one_sentence() -> None:
    imported = import_model(Ranked().eval(), example_inputs=(torch.randn(1, 1 << 17, 2),))
    with pytest.raises(DanceError, match="131072 values is not supported on a GPU: order fewer at a time"):
        lower(imported.mod, load_target("jetson-nano"), Options())


def test_an_order_that_is_not_defined_is_refused() -> None:
    class Unsorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.topk(2, sorted=False)[0]

    with pytest.raises(DanceError, match="sorted=False"):
        import_model(Unsorted().eval(), example_inputs=(torch.randn(3, 5),))


def test_conditions_and_differences_of_nan_are_those_of_pytorch(tmp_path: Path) -> None:
    """TVM takes "not above" for "at most", and zero for what is zero of numbers alone."""

    class Conditions(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            neither = torch.where(~(x < 0.1) & ~(x > 1), x, -x)
            buckets = torch.bucketize(x, torch.tensor([-0.5, 0.0, 1.0]))
            return (~(x > 0)).float(), neither, buckets, x - x, x * 0, nn.functional.softshrink(x), x.logical_not()

    x = odd(2, 4, 6)
    built = build_network(
        Conditions().eval(), tmp_path / "artifact", example_inputs=(x.nan_to_num(0, 9, -9),), threads=1, check=False
    )
    with open_device("local") as device:
        found = device.load(built.artifact).run({built.artifact.manifest.inputs[0].name: x.numpy()})
    for array, part in zip(found.values(), Conditions()(x), strict=True):
        np.testing.assert_allclose(array, part.numpy(), rtol=1e-5)


def test_onnx_orders_alike(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    node, values = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        node("TopK", ["x", "two"], ["most", "at"], axis=1),
        node("TopK", ["x", "two"], ["least", "there"], axis=2, largest=0),
        node("ArgMax", ["x"], ["where"], axis=2, keepdims=0),
        node("ArgMin", ["x"], ["last"], axis=1, select_last_index=1),
    ]
    names = {"most": 1, "at": 7, "least": 1, "there": 7, "where": 7, "last": 7}
    graph = onnx.helper.make_graph(
        nodes,
        "ordered",
        [values("x", 1, [2, 4, 6])],
        [values(name, kind, None) for name, kind in names.items()],
        [onnx.numpy_helper.from_array(np.array([2]), "two")],
    )
    path = tmp_path / "ordered.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    x = odd(2, 4, 6)
    low = lower(import_model(path).mod, load_target("host"), Options())
    machine = relax.VirtualMachine(tvm.compile(low.mod, target=load_target("host").tvm_target(1)), tvm.cpu())
    most, _, least, _, where, _ = outputs(machine, x)
    np.testing.assert_array_equal(most, x.topk(2, 1)[0].numpy())
    np.testing.assert_array_equal(least, x.topk(2, 2, largest=False)[0].numpy())
    np.testing.assert_array_equal(where, x.argmax(2).numpy())
