"""What can be refused from the command line, the files and the manifest alone is, before anything heavy is loaded."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, save
from pydantic import field_validator
from safetensors.numpy import save_file
from typer.main import get_command

from dance_tvm.artifact.c_interface import INTERFACE
from dance_tvm.artifact.folder import RUNTIME_VERSIONS, BuiltFor, Check, Manifest, Tensor, write_artifact
from dance_tvm.benchmarking.results import Results, write_results
from dance_tvm.core import cli
from dance_tvm.core.errors import DanceError, DanceWarning
from dance_tvm.core.input_files import read_inputs
from dance_tvm.core.options import MOST_THREADS
from dance_tvm.machines.target import load_target
from dance_tvm.models.network_inputs import declared_inputs
from dance_tvm.sparsity.data_names import READERS
from dance_tvm.sparsity.options import MethodOptions, checked
from dance_tvm.sparsity.settings import Settings

SCORES, VOLUME = ([1, 3], "class scores (N, classes)"), ([1, 8, 2, 2, 2], "output of the network")

#: Words of a command line, and what its one sentence must say. Files are those of the fixture `world`.
REFUSALS = {
    "build --target jetson-nano --weights-dtype float16": "--weights-dtype is for processors",
    "build --target jetson-nano --memory small": "--memory is for processors",
    "build --target board.toml": "is a riscv64 machine",
    "build --target snapdragn": "did you mean 'snapdragon'",
    "build --logs-from snapdragn": "did you mean 'snapdragon'",
    "build --logs nowhere": "there is no folder of tuning logs nowhere",
    "build --model c3d-maxi": "there is no network called 'c3d-maxi'",
    "build --model nowhere/net.onnx": "there is no model file nowhere/net.onnx",
    "build --model board.toml": "is not a model file of a known kind",
    "build --model finished": "is a folder, not a model file",
    "build --model torn.pt2": "torn.pt2 is not a .pt2 file, or is truncated",
    "build --model other.pt2": "holds no exported program",
    "build --model net.onnx --weights good.safetensors": "an ONNX file carries its weights",
    "build --weights nowhere/net.safetensors": "there is no weights file",
    "build --weights torn.safetensors": "is not a weights file, or is truncated",
    "build --weights board.toml": "is not a weights file, or is truncated",
    "build --shape clip=1x1x16x32x32": "--shape fixes what a file leaves open",
    "build --shape clip=1xA": "is not the name of an input and its extents",
    "build --model net.onnx": "net.onnx is not an ONNX file",
    "build --model empty.onnx": "empty.onnx is not an ONNX file",
    "build --model fixed.pt2 --batch 4": "'clip' is fixed to a batch of 2: export the network with an open batch",
    "build --model fixed.pt2 --shape clip=2x9": "(2, 8), which 2x9 does not fit: leave --shape out",
    "build --model fixed.pt2 --shape frames=2x8": "no input 'frames': it takes clip",
    "build --model fixed.pt2 --check-inputs clip.npz": "has shape (1, 3, 4, 8, 8), and fixed.pt2 takes (2, 8)",
    "build --model open.pt2": "dynamic shape (s77, 8): fix it with --shape clip=1x8",
    "build --model open.pt2 --shape clip=2x9": "2x9 does not fit: give its fixed dimensions as they are",
    "build --model open.pt2 --batch 2 --calibrate clip.npz --dtype float16 --target snapdragon": "takes (2, 8)",
    "build --model open.onnx --shape frames=2x8": "no input 'frames': it takes clip",
    "build --model open.onnx --shape clip=2x9": "(N, 8), which 2x9 does not fit",
    "build --model open.onnx": "dynamic shape (N, 8)",
    "build --threads 999": "--threads must be a number of at most 64, not '999'",
    "build --target bytes.toml": "target file bytes.toml is not a text file in UTF-8",
    "build --preprocess bytes.toml": "--preprocess bytes.toml is not a text file in UTF-8",
    "build --out finished": "is there and is not an artifact",
    "build --out file/out": "cannot be written (Not a directory): choose another --out",
    "build --debug-dump file/dump": "choose another --debug-dump",
    "build --preprocess nowhere.toml": "there is no file nowhere.toml",
    "build --preprocess board.toml": "the fields are resize",
    "build --calibrate nowhere.npz --dtype float16 --target snapdragon": "there is no input file nowhere.npz",
    "build --calibrate clip.npz": "--calibrate shows what a processor's --dtype float16",
    "build --check-inputs board.toml": "is not an .npz or .npy file",
    "build --check-inputs clip.npz": "has shape (1, 3, 4, 8, 8), and dance-c3d-mini takes clips of (1, 16, 32, 32)",
    "build --check-inputs wide.npz": "has type float64, and dance-c3d-mini takes float32: convert it by .astype",
    "build --model typed.pt2 --check-inputs two.npz": "two has type float64, and typed.pt2 takes float32",
    "build --model typed.pt2 --io float16 --check-inputs two.npz": "and typed.pt2 takes float16",
    "build --model open.onnx --shape clip=2x8 --check-inputs two.npz": "and open.onnx takes float32",
    "build --check-inputs clip.npz --no-check": "--check-inputs are for the check",
    "build --numerics exact --conv winograd": "keeps the order of sums",
    "build --dtype auto --no-check": "--dtype auto takes what the check passes in",
    "build --target aarch64-linux --check": "the build cannot be checked",
    "build --target snapdragon --layer-errors": "--layer-errors looks at the layers of a program on this machine",
    "build --json --json-lines": "not both",
    "build --targt host": "there is no option --targt, did you mean --target",
    "build --shape clip=1x8 --shape clip=2x8": "--shape is given twice for one input",
    "build --check --no-check": "--check and --no-check are both given",
    "build --target host --target snapdragon": "--target is given twice, as host and as snapdragon",
    "build --target nanos": "did you mean 'jetson-nano'",
    "build -q -v": "give one of them",
    "tune --trials 0": "--trials must be at least 1",
    "tune --trials 99999999999999999999": "--trials must be at most 2,147,483,647",
    "tune --density 1.5": "--density must lie between 0 and 1",
    "tune --density 0.5 --density nan": "--density must be a finite number, not nan",
    "tune --seed 1.5": "--seed must be a whole number, not '1.5'",
    "tune --plot nowhere/search.html": "there is no folder nowhere",
    "tune --masks frames": "--masks knows in_frames",
    "tune --target snapdragon --device local": "this machine and not snapdragon",
    "tune --target aarch64-linux --device emulator": "there is no emulated device here",
    "tune --plot search.png": "must end in .html",
    "tune --plot file/search.html": "choose another --plot",
    "tune --target aarch64-linux --device rpc://127.0.0.1:9": "cannot be reached: Connection refused",
    "tune --target aarch64-linux --device tracker://127.0.0.1:9/x": "no tracker answers at 127.0.0.1:9",
    "tune --target jetson-nano --device emulator": "--device emulator has no GPU",
    "groups --target aarch64-linux --device rpc://127.0.0.1:9": "cannot be reached: Connection refused",
    "tune --device nowhere": "unknown device 'nowhere'",
    "tune --model torn.pt2": "is not a .pt2 file",
    "tune --weights board.toml": "is not a weights file",
    "tune --logs file/logs": "choose another --logs",
    "tune --clips nowhere.mp4": "the video nowhere.mp4 is missing",
    "tune --clips nosuch": "there are no clips called 'nosuch'",
    "tune --target jetson-nano --device rpc://127.0.0.1:9 --conv winograd": "Winograd's kernels are a processor's",
    "groups --group 4by4": "is not a kernel group",
    "groups --device nowhere": "unknown device 'nowhere'",
    "groups --target snapdragon": "this machine and not snapdragon",
    "groups --target snapdragon --device rpc://127.0.0.1:9 --group 3x4": "groups of 3x4 do not fit snapdragon",
    "groups --logs file/logs": "choose another --logs",
    "run here --device emulator": "this device is aarch64",
    "run phone": "rebuild it with --target, or choose another --device",
    "run phone --device emulator": "there is no emulated device here",
    "run phone --device tracker://127.0.0.1:9190": "lacks the key",
    "run nowhere": "there is no artifact nowhere",
    "run here --labels two.txt": "--labels names 2 classes, and no output has that many scores",
    "run here --labels nowhere.txt": "--labels nowhere.txt cannot be read",
    "run here --labels bytes.toml": "--labels bytes.toml is not a text file in UTF-8",
    "run plain --top 3": "--top is of class scores",
    "run here --outputs scores.csv": "must end in .npz",
    "run here --outputs nowhere/scores.npz": "there is no folder nowhere",
    "run here --inputs clip.npz --outputs finished/../clip.npz": "would be written over --inputs clip.npz",
    "run here --outputs folder.npz": "(Is a directory): choose another --outputs",
    "run here --inputs nowhere.npz": "there is no input file nowhere.npz",
    "run here --inputs small.npz": "clip must be float32 of shape (1, 3, 4, 8, 8)",
    "run here --inputs clip.npz --stride 2": "--stride is that of a video's windows",
    "run here --inputs clip.npz --preprocess board.toml": "--preprocess is for frames of videos",
    "run here --inputs clip.npz --video clip.npz": "give one of --inputs, --video and --frames",
    "run here --video nowhere.mp4": "the video nowhere.mp4 is missing",
    "run here --video finished": "holds no video",
    "run here --frames board.toml": "is not a folder",
    "run here --frames finished": "holds no picture",
    "run here --video film.mp4 --preprocess tiny.toml": "smaller than the input's (8, 8)",
    "run flat --video film.mp4": "videos make one clip of 5 axes",
    "stream here --random 3": "is not a streaming network: its outputs after the first are not its next state; build "
    "the form that `dance-tvm export-dstep --stream` writes",
    "stream here --random 3 --device nowhere": "unknown device 'nowhere'",
    "stream here": "give --frames FILE or --random COUNT",
    "stream here --random 3 --outputs nowhere/scores.npz": "there is no folder nowhere",
    "bench here --device emulator": "this device is aarch64",
    "bench here --device tracker://127.0.0.1:9190": "lacks the key",
    "bench finished": "it is not an artifact of dance-tvm build",
    "bench nowhere": "there is no artifact nowhere",
    "bench here --dense plain": "is not a dense form of here",
    "bench here --out results.csv": "must end in .json",
    "bench here --out nowhere/results.json": "there is no folder nowhere",
    "bench here --trace nowhere/trace.json": "there is no folder nowhere",
    "bench here --trace trace.json --no-layers": "--trace shows layers",
    "bench here --most-clips 4": "--most-clips does nothing without --clips",
    "bench here --truth classes.csv": "--truth does nothing without --clips",
    "bench here --threshold 0.1": "--threshold does nothing without --against",
    "bench here --peer-model net.onnx": "--peer-model does nothing without --peer",
    "bench here --peer tensorrt --peer-model net.onnx": "--peer tensorrt is not known",
    "bench here --against board.toml": "holds no results of dance-tvm bench",
    "bench here --against results.json": "the baseline has nothing of these networks on local",
    "bench here --cluster big": "has no cluster 'big'",
    "bench here --cpus 3-0": "--cpus 3-0: 3-0 has no CPUs",
    "bench here --cpus 4096": "this machine has no CPUs [4096]",
    "bench here --threads 999": "--threads must be a number of at most 64",
    "bench here --clips clip.npz --truth bytes.toml": "--truth bytes.toml is not a text file in UTF-8",
    "bench here --cpus 1 --cluster big": "not both",
    "bench here --load-times --device emulator": "--load-times measures on this machine",
    "bench here --clips nowhere.npz": "there is no input file nowhere.npz",
    "bench here --clips small.npz": "and clip takes clips of (1, 3, 4, 8, 8)",
    "bench here --clips motion-digits,colour=3": "motion-digits takes train, test, size, frames, not colour",
    "bench here --clips clip.npz --truth board.toml": "write the clip's name, a comma and its class's number",
    "bench here --clips clip.npz --truth classes.csv": "film is of class 7, and test knows 3",
    "bench plain --clips clip.npz --truth classes.csv": "--truth needs an output of (1, classes)",
    "train --model c3d-maxi": "there is no network called 'c3d-maxi'",
    "train --method dstep --model c3d": "--method dstep thins residual networks",
    "train --out finished": "finished holds a finished run",
    "train --out file/run": "choose another --out",
    "train --resume --out finished": "holds no run to resume",
    "train --resume --overwrite --out finished": "give one of them",
    "train --resume --out started --epochs 9": "its epochs is 10, not 9, and only more than that prolong it",
    "train --resume --out started --lr 0.5": "its lr is 0.001, not 0.5; leave it out",
    "train --resume --out started --method kgs": "its method is 'aap', not 'kgs'",
    "train --resume --out started --target-macs 30%": "its options is {}, not {'target_macs': '30%'}",
    "train --method kgs --set epsylon=1": "there is no such option",
    "train --method kgs --epochs 1": "(35%): give --epochs 2 or more",
    "train --method kgs --set rate=fast": "rate: must be a number, not 'fast'",
    "train --set compute=1 --set compute=2": "--set compute is given twice",
    "train --target-macs half": "target_macs: 'half' is not an amount: write a share (0.5, 50%) or a count (120M)",
    "train --budget time:half --set units=units.json": "target_time: 'half' is not an amount",
    "train --lr inf": "--lr must be a finite number",
    "train --optimizer momentum": "--optimizer 'momentum' is not one of",
    "train --set units=nowhere.json": "nowhere.json",
    "train --init nowhere.safetensors": "there is no weights file",
    "train --init torn.safetensors": "is not a weights file",
    "train --no-amp --precision bfloat16": "leave --no-amp out",
    "train --data nosuch": "there are no clips called 'nosuch'",
    "train --data folder:nowhere": "there is no folder nowhere",
    "train --data csv:nowhere.csv": "there is no file nowhere.csv",
    "train --data ucf101": "--data ucf101 needs a path",
    "train --data motion-digits,train=many": "train is a whole number, not 'many'",
    "train --data motion-digits,train=0": "train is at least 1, not 0",
    "train --data motion-digits,frames=4": "frames is at least 8, not 4",
    "train --data motion-digits,test=8,test=9": "gives test twice",
    "train --data folder:finished,held_out=100": "held_out is 1 to 99, not 100",
    "train --data webdataset:nowhere.tar": "there is no folder and no file nowhere.tar",
    "export c3d-mini --out nowhere/net.pt2": "there is no folder nowhere",
    "export c3d-mini --out net.pth": "must end in .pt2 or .onnx",
    "export c3d-mini --weights nowhere.pt": "there is no weights file nowhere.pt",
    "export c3d-mini --weights DEFAULT": "is not a file",
    "export c3d-mini --mean 0.4 --mean 0.5": "--mean is given twice, as 0.4 and as 0.5",
    "export c3d-mini --mean 0.4,nan,0.5": "--mean 0.4,nan,0.5 is not a list of finite numbers",
    "export c3d-mini --mean 0.4,0.5": "--mean: 2 numbers for frames of three colours",
    "export nosuchmodule:Net --shape 1x2": "there is no module nosuchmodule",
    "export users/net.py:Net --shape 1x2": "names a file: give net:Net",
    "export users:Net": "--shape is missing",
    "export-dstep nowhere/model.safetensors": "there is no file of weights",
    "export-dstep good.safetensors": "is not a checkpoint of dance_tvm",
    "export-dstep started/checkpoint.safetensors": "holds no D-STEP network",
    "export-dstep --out nowhere/clip.pt2": "there is no folder nowhere",
    "export-dstep --out file/clip.pt2": "choose another --out",
    "units --model c3d-maxi": "there is no network called 'c3d-maxi'",
    "build --target nope": "unknown target 'nope': known targets are",
    "units --model torn.pt2": "is not a .pt2 file",
    "units --target jetson-nano": "is a GPU",
    "units --out nowhere/units.json": "there is no folder nowhere",
    "pack here --version 1.2.0": "--version is a wheel's",
    "pack here --format wheel --version one": "one",
    "pack here --out finished": "is there already",
    "pack here --out file/out": "choose another --out",
    "show finished": "it is not an artifact of dance-tvm build",
    "report results.json results.json results.json": "give one file of results, or two",
    "report results.json results.json --paper dance": "--paper and --tuning belong to one file of results",
    "report results.json --format json --out page.html": "must end in .json",
    "report results.json --out nowhere/page.html": "there is no folder nowhere",
    "report results.json --format json --out linked.json": "would be written over the results results.json",
    "bench here --against results.json --out results.json": "would be written over --against results.json",
    "report board.toml": "holds no results of dance-tvm bench: give the file that `bench --out` wrote",
    "report bytes.toml": "bytes.toml is not a text file in UTF-8",
    "report nowhere.json": "nowhere.json cannot be read (No such file or directory): check the path",
    "report here/manifest.json": "here/manifest.json is an artifact's manifest: `dance-tvm show here` shows it",
    "doctor --tracker foo": "--tracker must name HOST:PORT, not 'foo'",
    "device list --tracker foo": "--tracker must name HOST:PORT",
    "device watch --tracker foo": "--tracker must name HOST:PORT",
    "device phone --tracker farm:9190": "a phone on a cable reaches only this machine",
    "device phone finished --target snapdragon": "leave out --target or FOLDER",
    "device phone nowhere": "there is no folder nowhere",
    "device phone --target snapdragn": "did you mean 'snapdragon'",
    "device server file/out": "choose another FOLDER",
    "device server out --target snapdragn": "did you mean 'snapdragon'",
    "logs check nowhere.jsonl": "there is no log nowhere.jsonl",
    "logs merge all.jsonl nowhere.jsonl": "there is no log nowhere.jsonl",
    "logs merge nowhere/all.jsonl results.json": "there is no folder nowhere",
    "logs show --last 0": "--last must be a number of at least 1, not '0'",
    "logs shwo": "no such command 'shwo'. Did you mean 'show'",
    "logs show --layer 0123": "no log has a record of --layer 0123",
    "cache clear nothing": "holds no nothing",
    "targets snapdragn": "did you mean 'snapdragon'",
    "completion tcsh": "tcsh",
}  # fmt: skip

#: Runs every command line of a JSON list in one process: exit code, what it said, and heavy modules that it loaded.
RUN = """
import contextlib, io, json, sys
from dance_tvm.core import cli, verbosity

found = []
for line in json.load(open(sys.argv[1])):
    said, verbosity._level = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.start(cli._table_of_commands(), "dance-tvm", line.split())
        except SystemExit as ended:
            code = ended.code
        except BaseException as problem:
            code = repr(problem)
    heavy = [name for name in ("tvm", "torch", "scipy", "onnxruntime") if name in sys.modules]
    found.append([code, said.getvalue(), heavy])
print(json.dumps(found))
"""


def fake_artifact(folder: Path, output: tuple[list[int], str], machine: str = "x86_64", target: str = "host",
                  shape: tuple[int, ...] = (1, 3, 4, 8, 8)) -> None:  # fmt: skip
    """A sealed artifact without code in its library: nothing of it is run here."""
    head = b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", {"x86_64": 62, "aarch64": 183}[machine])
    built = BuiltFor(
        name=target, machine=machine, tuning_log=target, fingerprint=load_target(target).fingerprint,
        tvm={"kind": "llvm"}, host=None, threads=1,
    )  # fmt: skip
    manifest = Manifest(
        name="test",
        source_sha256="0",
        inputs=[Tensor(name="clip", shape=list(shape), dtype="float32", meaning="clips (N, C, T, H, W)")],
        outputs=[Tensor(name="scores", shape=output[0], dtype="float32", meaning=output[1])],
        target=built,
        versions={name: version(name) for name in RUNTIME_VERSIONS},
        memory_peak_bytes=0,
        check=Check(status="not run"),
    )
    write_artifact(folder, lambda path: path.write_bytes(head + bytes(64)) and None, {}, manifest)


def fake_program(path: Path, batch: dict[str, Any], **facts: Any) -> None:
    """An archive that says of its inputs what exported programs say, and holds nothing else."""
    taken = [{"parameter": {"arg": {"name": "w"}}}, {"user_input": {"arg": {"as_tensor": {"name": "clip"}}}}]
    values = {"clip": {"sizes": [batch, {"as_int": 8}], **facts}}
    module = {"signature": {"input_specs": taken}, "graph": {"tensor_values": values}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/models/model.json", json.dumps({"graph_module": module}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the command lines name; `nowhere` is not there, and `file` is no folder."""
    root = tmp_path_factory.mktemp("world")
    fake_artifact(root / "here", SCORES)
    fake_artifact(root / "phone", SCORES, "aarch64", "aarch64-linux")
    fake_artifact(root / "plain", VOLUME)
    fake_artifact(root / "flat", SCORES, shape=(1, 3, 8, 8))
    np.savez(root / "clip.npz", clip=np.zeros((1, 3, 4, 8, 8), "float32"))
    np.savez(root / "small.npz", clip=np.zeros((1, 3, 4, 4, 4), "float32"))
    for name in ("finished", "folder.npz", "started"):
        (root / name).mkdir()
    (root / "finished" / "card.json").write_text("{}")
    board = (Path(load_target.__code__.co_filename).parents[1] / "targets" / "aarch64-linux.toml").read_text()
    (root / "board.toml").write_text(board.replace('machine = "aarch64"', 'machine = "riscv64"'))
    (root / "tiny.toml").write_text("resize = [4, 4]\n")
    for name in ("file", "film.mp4", "torn.pt2", "torn.safetensors", "net.onnx"):
        (root / name).write_text("of no kind")
    (root / "bytes.toml").write_bytes(b"\x80\xff\x00 of no kind")
    (root / "empty.onnx").touch()
    with zipfile.ZipFile(root / "other.pt2", "w") as archive:
        archive.writestr("notes.txt", "no program")
    fake_program(root / "fixed.pt2", {"as_int": 2})
    fake_program(root / "typed.pt2", {"as_int": 2}, dtype=7)
    np.savez(root / "wide.npz", clip=np.zeros((1, 1, 16, 32, 32)))
    np.savez(root / "two.npz", two=np.zeros((2, 8)))
    fake_program(root / "open.pt2", {"as_expr": {"expr_str": "Symbol('s77', positive=True, integer=True)"}})
    clip = helper.make_tensor_value_info("clip", TensorProto.FLOAT, ["N", 8])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 8])
    graph = helper.make_graph([helper.make_node("Relu", ["clip"], ["scores"])], "test", [clip], [scores])
    save(helper.make_model(graph), root / "open.onnx")
    save_file({"w": np.zeros(2, "float32")}, root / "good.safetensors")
    run = Settings(method="aap", model="c3d-mini", data="motion-digits").fingerprint()
    card = {"dance_tvm": json.dumps({"settings": run})}
    save_file({"w": np.zeros(2, "float32")}, root / "started" / "checkpoint.safetensors", metadata=card)
    (root / "two.txt").write_text("jump\nrun\n")
    (root / "classes.csv").write_text("film,7\n")
    write_results(root / "results.json", Results(created="today", command="", host={}, devices=[]))
    (root / "linked.json").symlink_to("results.json")
    return root


@pytest.fixture(scope="module")
def refused(world: Path) -> dict[str, list[Any]]:
    """Each command line's exit code, words, and heavy modules, all from one process without an emulator."""
    (world / "lines.json").write_text(json.dumps([*REFUSALS]))
    path = os.pathsep.join([str(Path(sys.executable).parent)])  # neither qemu nor mmdebstrap
    environment = {**os.environ, "PATH": path, "DANCE_TVM_CACHE": str(world / "cache"), "COLUMNS": "400"}
    command = [sys.executable, "-c", RUN, "lines.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=world, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(REFUSALS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("line", REFUSALS)
def test_what_cannot_be_is_refused_at_once(line: str, refused: dict[str, list[Any]]) -> None:
    code, said, heavy = refused[line]
    assert code == 2, said
    assert REFUSALS[line] in said
    assert not heavy, f"{heavy} loaded by this command or one before it"


def test_nothing_is_left_by_a_refusal(world: Path, refused: dict[str, list[Any]]) -> None:
    assert refused
    left = [path.name for path in world.rglob("*") if "partial" in path.name or path.name.startswith(".")]
    assert not left
    assert not (world / "artifacts").exists()
    assert not (world / "trained").exists()


#: Where commands write; what has another name, as a log that is merged into, has its own line above.
WRITTEN = {"--out", "--outputs", "--plot", "--trace", "--debug-dump", "--logs"}


def test_every_place_that_is_written_is_looked_at_first() -> None:
    """A folder is made, so what stands in its way is refused; a file's folder must be there."""
    for name, (module, _) in cli.COMMANDS.items():
        command = get_command(import_module(module).app)
        for option in WRITTEN & {option for parameter in command.params for option in parameter.opts}:
            lines = [line for line in REFUSALS if re.match(rf"{name} .*{option} (file|nowhere)", f"{line} ")]
            assert lines, f"no refusal of {name} {option}"


def test_readers_of_clips_take_the_options_that_are_told() -> None:
    for reader in READERS.values():
        module, _, function = reader.function.partition(":")
        taken = [*inspect.signature(getattr(import_module(module), function)).parameters]
        assert sorted(taken[3:]) == sorted(reader.options), reader


def test_programs_say_of_their_inputs_what_pytorch_says(tmp_path: Path) -> None:
    from torch import nn, randn
    from torch.export import Dim, export
    from torch.export import save as save_program

    for name, given, wanted in (("fixed", None, 2), ("open", ({0: Dim("batch", min=1, max=9)},), str)):
        program = export(nn.Linear(8, 3), (randn(2, 8),), dynamic_shapes=given)
        save_program(program, tmp_path / f"{name}.pt2")
        declared = declared_inputs(tmp_path / f"{name}.pt2")
        assert declared is not None
        ((first, second),) = declared.shapes.values()
        assert second == 8
        assert first == wanted or (wanted is str and isinstance(first, str))
        assert [*declared.types.values()] == ["float32"]


def test_a_description_of_an_unknown_form_is_left_to_its_reader(tmp_path: Path) -> None:
    fake_program(tmp_path / "computed.pt2", {"as_expr": {"expr_str": "Mul(Integer(2), Symbol('s0'))"}})
    assert declared_inputs(tmp_path / "computed.pt2") is None
    with zipfile.ZipFile(tmp_path / "foreign.pt2", "w") as archive:
        archive.writestr("archive/models/model.json", "[1, 2]")
    assert declared_inputs(tmp_path / "foreign.pt2") is None


def test_no_more_threads_are_taken_than_artifacts_have_room_for() -> None:
    assert f"#define MOST_THREADS {MOST_THREADS}\n" in (INTERFACE / "runtime.h").read_text()


def _first_texts(call: ast.Call) -> tuple[str, str]:
    """How the literal that an error is made of begins and ends."""
    parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else [call.args[0]]
    texts = [part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "" for part in parts]
    return texts[0], texts[-1]


def test_errors_are_clauses_without_a_capital_or_a_full_stop() -> None:
    found = []
    for path in Path(cli.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "DanceError":
                first, last = _first_texts(node)
                if re.match(r"[A-Z][a-z]*\b(?<!PyTorch)", first) or re.search(r"[^.]\.$", last):
                    found.append(f"{path.name}, line {node.lineno}: {first} … {last}")
    assert not found


def test_faults_are_told_in_our_words() -> None:
    class Form(MethodOptions):
        scheme: str

        @field_validator("scheme")
        @classmethod
        def _known(cls, value: str) -> str:
            raise ValueError(f"{value!r} is not one of ours")

    with pytest.raises(DanceError, match=r"--method kgs: scheme: 'foo' is not one of ours$"):
        checked("kgs", Form, {"scheme": "foo"})


def test_another_name_of_the_one_input_is_told(world: Path, tmp_path: Path) -> None:
    spec = Tensor(name="clip", shape=[1, 2], dtype="float32", meaning="")
    np.savez(tmp_path / "own.npz", frames=np.zeros((1, 2), "float32"))
    with pytest.warns(DanceWarning, match="holds frames, which is taken for net's one input, clip"):
        read_inputs(tmp_path / "own.npz", [spec], "net")
