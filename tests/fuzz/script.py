"""A failing program as a script that needs nothing but PyTorch and the compiler."""

from __future__ import annotations

from .program import Program, write_out
from .trial import Verdict

_MAIN = """

def main():
    net = settle(Net(), {seed})
    shapes, masks, options = {shapes}, {masks}, {options}
    dtypes = {dtypes}
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        network = None
        for case, style in enumerate({styles}):
            generator = torch.Generator().manual_seed(case)
            inputs = [drawn(shape, getattr(torch, dtypes[name]), generator) for name, shape in shapes.items()]
            for index, name in enumerate(shapes):
                if name in masks and style != "normal":
                    inputs[index] = inputs[index].abs() + 2 if style == "on" else -inputs[index].abs() - 2
                elif style == "offset" and name not in masks and inputs[index].is_floating_point():
                    inputs[index] = inputs[index] * 3 + 10
            if network is None:
                built = build_network(net, folder + "/artifact", example_inputs=tuple(inputs), **options)
                print([layer.kernel for layer in built.artifact.manifest.layers])
                network = open_device("local").load(built.artifact)
            names = [tensor.name for tensor in built.artifact.manifest.inputs]
            found = network.run({{name: x.numpy() for name, x in zip(names, inputs)}}).values()
            torch.set_default_dtype(torch.float64)
            with torch.no_grad():
                wanted = copy.deepcopy(net).double()(*[x.double() if x.is_floating_point() else x for x in inputs])
            torch.set_default_dtype(torch.float32)
            wanted = [wanted] if isinstance(wanted, torch.Tensor) else wanted
            for array, want in zip(found, wanted):
                apart = (torch.from_numpy(array).double() - want.double()).abs().nan_to_num(float("inf"))
                largest = max([1e-30, *want.double().abs().flatten().tolist()])
                worst = max([worst, *(apart / largest).flatten().tolist()])
    print("FAIL" if worst > 1e-4 else "PASS", f"largest difference {{worst:.3g}} of the largest value")


main()
"""


def script(program: Program, verdict: Verdict) -> str:
    """The text; its first line says what failed, its last lines build, run and compare."""
    network = write_out(program)
    options = {
        key: value for key, value in program.options.items() if key in ("threads", "conv", "numerics", "sparsity")
    }
    arguments = f"dict(check={program.options.get('check', False)}, threads={options.get('threads', 1)}, "
    arguments += f"options=Options(**{options}))"
    told = " ".join(verdict.told.split())[:300]
    lines = [
        f"# {verdict.kind}: {told}",
        f"# seed {program.seed}, options {program.options}",
        "import copy",
        "import tempfile",
        "",
        network.source.replace("import torch\n", "import torch\n", 1),
        "",
        "from dance_tvm import Options, build_network, open_device",
    ]
    main = _MAIN.format(
        seed=program.seed,
        shapes=network.shapes,
        masks=sorted(network.masks),
        options=arguments,
        dtypes={name: str(dtype).removeprefix("torch.") for name, dtype in network.dtypes.items()},
        styles=["normal", "normal", "normal", "on", "off", "offset"],
    )
    return "\n".join(lines) + "\n" + main + f"\n# {program.to_json()}\n"
