"""Layers that `python -m benchmarks.gpu --export` wrote: are they right on this GPU, and how fast beside PyTorch?

    python gpu_layers.py [--rounds 10] [--json FILE]

It lies beside the layers and needs numpy, PyTorch and the GPU's driver alone, no TVM and no CUDA toolkit. Each layer is
a library with the C interface. Weights and inputs are small whole numbers, so that answers are equal to the last bit
with PyTorch's in double precision, whatever the order of a sum. Both sides are warm and take turns; PyTorch computes in
float32 without TF32, in the faster of its two memory formats, what is masked too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
WHERE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[[], torch.Tensor]
Prepared = Callable[[torch.memory_format], Call]
FORMATS = (torch.contiguous_format, torch.channels_last_3d)


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Whole numbers from -2 to 2, the same wherever they are drawn."""
    state = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(977 * seed)
    state ^= state >> np.uint32(15)
    state *= np.uint32(2246822519)
    state ^= state >> np.uint32(13)
    return ((state % 5).astype(np.float32) - 2).reshape(shape)


def inputs_of(model: Any, density: float) -> dict[str, np.ndarray]:
    """A clip, and for a masked layer scores of which the share ``density`` is above zero."""
    found = {}
    for seed, (name, (shape, _)) in enumerate(model.inputs.items()):
        found[name] = drawn(shape, seed)
        if name == "score":
            order = np.argsort(drawn(shape, 7).ravel() + np.linspace(0, 0.5, found[name].size), kind="stable")
            found[name] = np.where(order < round(density * order.size), 1, -1).astype("float32").reshape(shape)
    return found


def reference(
    layer: dict[str, Any], inputs: dict[str, np.ndarray], weight: torch.Tensor, dtype: torch.dtype
) -> Prepared:
    """The layer by PyTorch, as a function of a memory format."""
    clip = torch.from_numpy(inputs["clip"]).to(WHERE, dtype)
    mask = torch.from_numpy(inputs["score"] > 0).to(WHERE, dtype) if "score" in inputs else None
    if mask is not None and layer["masked"] == "channels":
        clip = clip * mask

    def prepared(form: torch.memory_format) -> Call:
        x, w = clip.contiguous(memory_format=form), weight.to(WHERE, dtype).contiguous(memory_format=form)

        def call() -> torch.Tensor:
            y = torch.relu_(torch.nn.functional.conv3d(x, w, None, layer["stride"], layer["padding"]))
            return y * mask if mask is not None and layer["masked"] == "positions" else y

        return call

    return prepared


def weight_of(layer: dict[str, Any]) -> torch.Tensor:
    """As the layer was exported: of kernel groups, columns are zero in all filters of a group alike."""
    shape = (layer["channels_out"], layer["channels_in"], *layer["kernel"])
    weight = drawn(shape, 3)
    if layer["groups_of"]:
        count = layer["channels_out"] // layer["groups_of"]
        kept = drawn((count, *shape[1:]), 5) > 0
        weight *= np.repeat(kept, layer["groups_of"], axis=0)
    return torch.from_numpy(weight)


def seconds_of(call: Call) -> float:
    """Of one call, when it is done."""
    wait = torch.cuda.synchronize if WHERE == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def measured(layer: dict[str, Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Whether the layer's answers are right, and medians of both sides' milliseconds."""
    from dance_model import Model  # beside this file, where it was exported

    weight = weight_of(layer)
    with Model(folder, 1) as model, torch.no_grad():
        inputs = inputs_of(model, layer["density"])
        (found,) = model.run(inputs).values()
        expected = reference(layer, inputs, weight, torch.float64)(FORMATS[0])()
        equal = bool(np.array_equal(found, expected.float().cpu().numpy()))
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            theirs = [reference(layer, inputs, weight, torch.float32)(form) for form in FORMATS]
            warm = [model.time(inputs, 2), *([seconds_of(call) for _ in range(2)] for call in theirs)]
            assert all(warm)
            turns = [(model.time(inputs, 1)[0], min(seconds_of(call) for call in theirs)) for _ in range(rounds)]
    ours, other = (1e3 * median(side) for side in zip(*turns, strict=True))
    return {**layer, "equal": equal, "ms": ours, "pytorch_ms": other, "times as fast": other / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for layer in json.loads((HERE / "layers.json").read_text()):
        with tempfile.TemporaryDirectory() as name:
            zipfile.ZipFile(HERE / layer["file"]).extractall(name)
            rows.append(measured(layer, Path(name), words.rounds))
        last = rows[-1]
        told = f"{last['ms']:9.3f} ms, PyTorch {last['pytorch_ms']:9.3f} ms, {last['times as fast']:.2f} times as fast"
        print(f"{last['name']:40} {'right' if last['equal'] else 'WRONG'} {told}", flush=True)
    device = torch.cuda.get_device_name() if WHERE == "cuda" else "no GPU of PyTorch's"
    if words.json:
        words.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "layers": rows}, indent=1))
    raise SystemExit(0 if all(row["equal"] for row in rows) else 1)


if __name__ == "__main__":
    main()
