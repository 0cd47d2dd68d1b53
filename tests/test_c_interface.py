"""The C interface: the same answers as TVM's virtual machine, from C, C++ and numpy, without TVM in the process."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from dance_tvm import Options, build_network, import_model
from dance_tvm.artifact.c_interface import HEADER, INTERFACE
from dance_tvm.artifact.folder import load_artifact
from dance_tvm.artifact.interface.dance_model import Model, ModelError, _addresses, _Api, _api_of, _Options
from dance_tvm.artifact.linker import seal
from dance_tvm.compiler.pipeline import lower
from dance_tvm.core.errors import DanceError
from dance_tvm.device import open_device
from dance_tvm.machines.host import FEATURES, cpu_flags
from dance_tvm.machines.target import load_target

EXAMPLES = Path(__file__).parent.parent / "examples"
C = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{INTERFACE}"]
CPP = ["-std=c++17", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{INTERFACE}"]
LIBRARIES = ["-ldl", "-lm", "-lpthread"]

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs the system's C compiler")
needs_cxx = pytest.mark.skipif(shutil.which("c++") is None, reason="needs the system's C++ compiler")


class Masked(nn.Module):
    """Two convolutions, the second under a mask that the first decides; two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 16, 3, padding=1)
        self.second = nn.Conv3d(16, 16, 3, padding=1)
        self.score = nn.Linear(16, 5)

    def forward(self, clip: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.relu(self.first(clip))
        mask = (features.mean((2, 3, 4), keepdim=True) > 0.1).float()
        features = torch.relu(self.second(features * mask))
        return self.score(features.mean((2, 3, 4))) + shift, features


class Counter(nn.Module):
    """A stream: scores of the frames so far, and two states that change places."""

    def forward(self, frame: torch.Tensor, total: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, ...]:
        now = total + frame
        return now * 2 + last, now + 0 * last, total * 1


def built(network: nn.Module, out: Path, *inputs: torch.Tensor, threads: int = 2, **options) -> Path:
    settings = Options(threads=threads, **options)
    return build_network(network.eval(), out, example_inputs=inputs, options=settings, check=False).artifact.path


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return built(Masked(), tmp_path_factory.mktemp("c") / "masked", torch.randn(1, 3, 4, 8, 8), torch.randn(1, 5))


@pytest.fixture(scope="module")
def call() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs, and what the virtual machine answers to them."""
    torch.manual_seed(0)
    network, example = Masked().eval(), (torch.randn(1, 3, 4, 8, 8), torch.randn(1, 5))
    imported, target, options = import_model(network, example_inputs=example), load_target("host"), Options(threads=2)
    lowered = lower(imported.mod, target, options)
    rng = np.random.default_rng(1)
    inputs = {each.name: rng.standard_normal(each.shape).astype(each.dtype) for each in imported.inputs}
    machine = relax.VirtualMachine(tvm.compile(lowered.mod, target.tvm_target(2)), tvm.cpu())
    answers = machine["main"](*map(tvm.runtime.tensor, inputs.values()))
    return inputs, {spec.name: answer.numpy() for spec, answer in zip(imported.outputs, answers, strict=True)}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_answers_are_those_of_the_virtual_machine_to_the_bit(masked, call, threads):
    inputs, expected = call
    with Model(masked, threads) as model:
        for _ in range(3):
            assert_same(model.run(inputs), expected)


def at(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy so many bytes behind a multiple of 64."""
    room = np.empty(array.nbytes + 128, np.uint8)
    begin = -room.ctypes.data % 64 + offset
    moved = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def test_inputs_and_outputs_at_any_address_are_taken(masked, call):
    inputs, expected = call
    with Model(masked) as model:
        for offset in (0, 4):
            given = {name: at(array, offset) for name, array in inputs.items()}
            for room in (0, 4):
                results = {name: at(np.full_like(array, np.nan), room) for name, array in expected.items()}
                written = _addresses(list(results.values()))
                model._require(
                    model._api.run(model._model, _addresses([given[each] for each in model.inputs]), written)
                )
                assert_same(results, expected)


def test_an_output_may_lie_where_an_input_lies(tmp_path):
    network = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1))
    example = torch.randn(1, 4, 4, 6, 6)
    with Model(built(network, tmp_path / "model", example)) as model:
        apart = at(example.numpy(), 0)
        expected = next(iter(model.run(dict.fromkeys(model.inputs, apart)).values()))
        model._require(model._api.run(model._model, _addresses([apart]), _addresses([apart])))
        np.testing.assert_array_equal(apart, expected)


class Delay(nn.Module):
    """A delay line: the frame, and what was the last one before, move on by one place as they are."""

    def forward(self, frame: torch.Tensor, last: torch.Tensor, older: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return frame + last * older, frame, last


def test_an_input_that_is_an_output_too_may_be_overwritten(tmp_path):
    shape = (1, 64)  # whole lines of 64 bytes, which kernels read and write in place
    path = built(Delay(), tmp_path / "delay", *torch.zeros(3, *shape))
    given = [np.full(shape, value, "float32") for value in (2, 3, 5)]
    expected = given[0] + given[1] * given[2], given[0], given[1]
    with Model(path) as model:
        for swap in (0, 1, 2):
            memory = [room.copy() for room in given]
            held = list(model._room().values())
            for array, value in zip(held, memory, strict=True):
                array[:] = value
            results = [held[(swap + each) % 3] for each in range(3)]
            model._require(model._api.run(model._model, _addresses(held), _addresses(results)))
            for found, wanted in zip(results, expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
        room, last, older = next(iter(model._room().values())), 0, 0
        apart = [at(value, 4) for value in given]
        for now in (2, 5, 7, 11):
            room[:] = now
            model._require(model._api.step(model._model, room.ctypes.data, room.ctypes.data))
            assert room[0, 0] == now + last * older
            last, older = now, last
            model._require(
                model._api.run(model._model, _addresses(apart), _addresses(apart))
            )  # leaves the stream alone


def test_models_run_at_once_in_several_threads_and_share(masked, call):
    inputs, expected = call
    found: list[dict[str, np.ndarray]] = []

    def run(model: Model) -> None:
        for _ in range(50):
            found.append(model.run(inputs))

    first = Model(masked, 2)
    models = [first, *(Model(masked, 2, share=first) for _ in range(3))]
    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.close()  # the others go on without it
    assert_same(models[1].run(inputs), expected)
    assert len(found) == 200
    for each in found:
        assert_same(each, expected)


def together(*calls) -> None:
    """Run these at once, each in a thread of its own, and raise what one of them raises."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def test_several_threads_may_call_one_network(masked, tmp_path):
    rng = np.random.default_rng(2)
    with open_device("local") as device:
        network = device.load(load_artifact(masked))
        inputs = [{each: rng.standard_normal(shape).astype(kind) for each, (shape, kind) in
                   network._model.inputs.items()} for _ in range(3)]  # fmt: skip
        expected = [network.run(each) for each in inputs]

        def run(index: int) -> None:
            for _ in range(60):
                assert_same(network.run(inputs[index]), expected[index])

        together(*(partial(run, index) for index in range(3)), lambda: network.kernels(inputs[0]))
    with pytest.raises(DanceError, match="local: this session is closed"):
        network.run(inputs[0])
    with pytest.raises(DanceError, match="local: this session is closed"):
        device.load(load_artifact(masked))
    frame = np.ones((1, 6), "float32")
    with open_device("local") as device:
        stream = device.load(load_artifact(built(Counter(), tmp_path / "s", *torch.zeros(3, 1, 6)))).stream()
        together(*[lambda: [stream.step(frame) for _ in range(100)]] * 3)
        assert stream.step(frame)[0, 0] == 602 + 299  # of 301 frames none is lost


def test_a_call_while_another_threads_is_under_way_is_refused(masked, call):
    inputs, expected = call
    said = set()

    def look(*_: object) -> None:
        addresses = _addresses(model._given(inputs)), _addresses(list(model._room().values()))
        for code in (model._api.run(model._model, *addresses), model._api.reset(model._model),
                     model._api.profile(model._model, 1)):  # fmt: skip
            said.add((code, model._api.error(model._model)))

    with Model(masked) as model:
        assert_same(model.watch(inputs, look), expected)
        assert said == {(6, b"the model is running in another thread: its calls must not overlap")}
        assert_same(model.run(inputs), expected)
        together(lambda: model.run(inputs), model.close)
    for used in (lambda: model.run(inputs), model.reset, model.cancel, model.layers, model.memory):
        with pytest.raises(ModelError, match="is closed"):
            used()


@pytest.mark.parametrize("used", ["run", "watch", "reset", "close"])
def test_what_a_watcher_raises_is_raised_and_it_cannot_call_or_close_its_own_model(masked, call, used):
    inputs, expected = call
    with Model(masked) as model:
        uses = {"run": partial(model.run, inputs), "watch": partial(model.watch, inputs, print),
                "reset": model.reset, "close": model.close}  # fmt: skip
        with pytest.raises(ModelError, match="under way and shows a kernel"):
            model.watch(inputs, lambda *_: uses[used]())
        seen: list[str] = []

        def stop(kernel: str, _tensors: list[np.ndarray]) -> None:
            seen.append(kernel)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            model.watch(inputs, stop)
        assert len(seen) == 1, "the rest of the network is not run"
        assert_same(model.run(inputs), expected)


def test_a_model_leaves_nothing_behind(masked, call):
    inputs, _ = call
    status = Path("/proc/self/status")

    def kept() -> tuple[int, int, int]:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["RssAnon"].split()[0]), int(lines["Threads"]), len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        with Model(masked, 3) as model:
            model.run(inputs)

    for _ in range(50):
        once()
    memory, threads, files = kept()
    for _ in range(300):
        once()
    after = kept()
    assert after[1:] == (threads, files)
    assert after[0] - memory < 2000, "kB of memory that 300 models left"


def test_weights_beside_the_library_are_verified_and_prepared(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(2100, 2100), nn.ReLU(), nn.Linear(2100, 3))
    x = torch.randn(1, 2100)
    folder = built(network, tmp_path / "large", x)
    assert (folder / "weights.safetensors").exists()
    with Model(folder) as model:
        (found,) = model.run({next(iter(model.inputs)): x.numpy()}).values()
    np.testing.assert_allclose(found, network(x).detach().numpy(), atol=1e-5)

    data = (folder / "weights.safetensors").read_bytes()
    package = tmp_path / "package"
    package.write_bytes(bytes(4109) + data)
    assert refusal(folder, package, 4109, len(data)) == ""
    for offset, size, said in [
        (4108, len(data) + 4109, "is damaged"),
        (4110, len(data) + 4109, "check offset and length"),
        (4109, len(data) // 2, "check offset and length"),
        (2**40, len(data) + 4109, "check offset and length"),
    ]:
        os.truncate(package, size)
        assert said in refusal(folder, package, offset, len(data))
    rng = np.random.default_rng(0)
    changes = [mutated(data, border, rng) for border in (8, 500, len(data)) for _ in range(30)]
    for damaged in [b"", data[:4], data[:200], data[:-1], data + b"\0", *changes]:
        (folder / "weights.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match="file of weights"):
            Model(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match="give weights_path"):
        Model(folder)


def refusal(folder: Path, package: Path, offset: int, length: int) -> str:
    """What `create` says of weights that lie within another file; empty where it takes them."""
    said = ctypes.create_string_buffer(512)
    api = _api_of(folder / "model.so")
    with package.open("rb") as file:
        options = _Options(
            size=ctypes.sizeof(_Options), weights_fd=file.fileno(), weights_offset=offset, weights_length=length
        )
        model = api.create(ctypes.byref(options), said, len(said))
    api.destroy(model)
    assert bool(model) is not bool(said.value)
    return said.value.decode()


def mutated(data: bytes, border: int, rng: np.random.Generator) -> bytes:
    """One to three bits of the first ``border`` bytes turned."""
    changed = bytearray(data)
    for place in set(rng.integers(0, border, rng.integers(1, 4)).tolist()):
        changed[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def test_a_stream_keeps_its_state(tmp_path):
    frames = torch.arange(24.0).reshape(4, 1, 6)
    folder = built(Counter(), tmp_path / "stream", *torch.zeros(3, 1, 6))
    total, last = torch.zeros(1, 6), torch.zeros(1, 6)
    with Model(folder) as model:
        for _ in range(2):
            for frame in frames:
                expected, total, last = Counter()(frame, total, last)
                np.testing.assert_array_equal(model.step(frame.numpy()), expected.numpy())
            model.reset()
            total, last = torch.zeros(1, 6), torch.zeros(1, 6)


def test_what_is_no_stream_says_so(masked):
    with Model(masked) as model, pytest.raises(ModelError, match="not a streaming network"):
        model.step(np.zeros((1, 3, 4, 8, 8), "float32"))


def test_kernels_are_timed(masked, call):
    with Model(masked) as model:
        model.run(call[0])
        model.profile()
        for _ in range(3):
            model.run(call[0])
        layers = model.layers()
        assert sum(macs is not None for macs in model.work()) >= 2
        assert all(macs is None or macs % 3 == 0 for macs in model.work()), "of three calls"
        model._api = _Api.from_buffer_copy(model._api)
        model._api.size = _Api.work.offset
        with pytest.raises(ModelError, match="does not count work: build it anew"):
            model.work()
    assert {calls for _, calls, _ in layers} == {3}
    assert sum("conv3d" in kernel for kernel, _, _ in layers) >= 2
    assert all(nanoseconds > 0 for _, _, nanoseconds in layers)


def test_a_wrong_input_or_number_of_threads_is_refused_in_a_sentence(masked, call):
    with Model(masked) as model:
        with pytest.raises(ModelError, match="the inputs are"):
            model.run({"video": call[0]["clip"]})
        with pytest.raises(ModelError, match="must be float32 of shape"):
            model.run({**call[0], "clip": np.zeros((1, 3, 4, 8, 9), "float32")})
        assert_same(model.run(call[0]), call[1])
    with pytest.raises(ModelError, match="1 to 64 threads"):
        Model(masked, 65)
    here = os.sched_getaffinity(0)
    for cpus in ([min(here), 4000], [-1], [1023]):
        with pytest.raises(ModelError, match="a processor that this machine lacks"):
            Model(masked, 1, cpus=cpus)
    with Model(masked, 2, cpus=sorted(here)) as model:
        assert_same(model.run(call[0]), call[1])
    assert os.sched_getaffinity(0) == here


def test_wrong_addresses_and_numbers_of_runs_are_refused_in_a_sentence(masked, call):
    with Model(masked) as model:
        given, room = _addresses(model._given(call[0])), list(model._room().values())
        large = max(room, key=lambda array: array.nbytes)
        overlapping = _addresses([large.view(np.uint8).reshape(-1)[64:], large])
        assert model._api.run(model._model, given, overlapping) == 1
        assert b"two outputs lie in the same memory" in model._api.error(model._model)
        for runs in (3, -1):
            assert model._api.time(model._model, given, _addresses(room), runs, None) == 1
            assert b"time takes a number of runs" in model._api.error(model._model)
        with pytest.raises(ModelError, match="runs must be 0 or more, not -1"):
            model.time(call[0], -1)
        assert_same(model.run(call[0]), call[1])
    with open_device("local") as device:
        network = device.load(load_artifact(masked))
        for refused, least in ((network.time, 1), (network.kernels, 0)):
            with pytest.raises(DanceError, match=f"repeats must be {least} or more, not {least - 1}"):
                refused(call[0], least - 1)


def test_a_library_without_the_interface_is_refused_in_a_sentence(tmp_path):
    shutil.copy(_ctypes.__file__, tmp_path / "model.so")
    with pytest.raises(ModelError, match="has no seal at its end"):
        Model(tmp_path)
    seal(tmp_path / "model.so")
    with pytest.raises(ModelError, match="has no C interface"):
        Model(tmp_path)


def sections(library: Path) -> dict[str, tuple[int, int]]:
    """Where each section begins and ends in the file."""
    shown = subprocess.run(["readelf", "-SW", library], capture_output=True, text=True).stdout
    rows = [line.partition("]")[2].split() for line in shown.splitlines() if "] ." in line]
    return {row[0]: (int(row[3], 16), int(row[3], 16) + int(row[4], 16)) for row in rows}


@needs_cc
def test_a_damaged_library_is_refused_before_it_is_loaded(masked, tmp_path):
    """By C and by Python: bits turned in its code, its tables, its weights, its headers and its seal; bytes that are
    gone, exchanged or too many."""
    program = compiled("cc", [*C, "-D_DEFAULT_SOURCE"], EXAMPLES / "c/run_clip.c", tmp_path / "run_clip")
    sound, places = (masked / "model.so").read_bytes(), sections(masked / "model.so")
    damaged = {"cut": sound[:-1], "half": sound[: len(sound) // 2], "empty": b"", "more": sound + b"\0"}
    damaged["exchanged"] = sound[:4096] + sound[8192:12288] + sound[4096:8192] + sound[12288:]
    rng = np.random.default_rng(0)
    parts = {name: places[name] for name in (".text", ".rodata", ".dynamic", ".data.rel.ro")}
    parts |= {"header": (0, 64), "seal": (len(sound) - 16, len(sound)), "any": (0, len(sound))}
    for name, (begin, end) in parts.items():
        for number in range(5):
            changed = bytearray(sound)
            changed[int(rng.integers(begin, end))] ^= 1 << int(rng.integers(0, 8))
            damaged[f"{name} {number}"] = bytes(changed)
    library = tmp_path / "model.so"
    for name, data in damaged.items():
        library.write_bytes(data)
        with pytest.raises(ModelError, match=r"is damaged: |has no seal at its end: "):
            Model(tmp_path)
        done = subprocess.run([program, tmp_path, "in.bin", "out.bin"], capture_output=True, text=True)
        assert done.returncode == 2, name
        assert done.stderr.startswith((f"error: {library} is damaged: ", f"error: {library} has no seal at its end: "))


def test_weights_within_a_library_are_verified_by_create(masked, tmp_path):
    """Where nobody verified the file: it is sealed anew after the damage."""
    data = bytearray((masked / "model.so").read_bytes()[:-16])
    torch.manual_seed(0)
    at = data.find(Masked().second.weight.detach().numpy().tobytes()[:64])
    assert at > 0
    data[at + 17] ^= 1
    (tmp_path / "model.so").write_bytes(data)
    seal(tmp_path / "model.so")
    with pytest.raises(ModelError, match="what this library holds of weights is damaged"):
        Model(tmp_path)
    Model(tmp_path, verified=True).close()


def test_a_processor_without_the_instructions_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("dance_tvm.compiler.program.needed_flags", lambda _target: ["of_another_maker"])
    with pytest.raises(ModelError, match="uses of_another_maker instructions, which this processor lacks"):
        Model(built(nn.Linear(4, 4), tmp_path / "a", torch.zeros(1, 4)))


@needs_cc
def test_instruction_sets_are_those_that_linux_lists(tmp_path):
    source = tmp_path / "list.c"
    source.write_text(
        '#include "processor.c"\n#include <stdio.h>\n'
        "int main(int count, char **names) {\n"
        "  for (int each = 1; each < count; each++) if (processor_has(names[each])) puts(names[each]);\n"
        "  return 0;\n}\n"
    )
    program = compiled("cc", ["-std=c11", f"-I{INTERFACE}"], source, tmp_path / "list")
    found = subprocess.run([program, *FEATURES.values()], capture_output=True, text=True).stdout.split()
    assert set(found) == cpu_flags() & set(FEATURES.values())


def compiled(command: str, flags: list[str], source: Path, output: Path) -> Path:
    done = subprocess.run(
        [command, "-O1", *flags, str(source), "-o", str(output), *LIBRARIES], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return output


@needs_cc
def test_the_c_example_gives_the_same_bytes(masked, call, tmp_path):
    program = compiled("cc", [*C, "-D_DEFAULT_SOURCE"], EXAMPLES / "c/run_clip.c", tmp_path / "run_clip")
    inputs, expected = call
    (tmp_path / "in.bin").write_bytes(b"".join(array.tobytes() for array in inputs.values()) * 3)
    done = subprocess.run([program, masked, tmp_path / "in.bin", tmp_path / "out.bin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 calls" in done.stdout
    assert (tmp_path / "out.bin").read_bytes() == b"".join(array.tobytes() for array in expected.values()) * 3
    done = subprocess.run(
        [program, tmp_path, tmp_path / "in.bin", tmp_path / "out.bin"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


@needs_cxx
def test_the_cpp_example_runs(masked, tmp_path):
    program = compiled("c++", CPP, EXAMPLES / "cpp/run_clip.cpp", tmp_path / "run_clip_cpp")
    done = subprocess.run([program, masked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    done = subprocess.run([program, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:7]) == (2, "error: ")


def test_numpy_alone_runs_an_artifact(masked, tmp_path):
    shutil.copy(HEADER.with_name("dance_model.py"), tmp_path)
    code = (
        "import sys, numpy, dance_model\n"
        f"model = dance_model.Model({str(masked)!r})\n"
        "model.run({name: numpy.zeros(shape, kind) for name, (shape, kind) in model.inputs.items()})\n"
        "print(sorted({'tvm', 'torch', 'dance_tvm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_python_example_gives_the_same_arrays(masked, call, tmp_path):
    for file in (HEADER.with_name("dance_model.py"), EXAMPLES / "python_ctypes.py"):
        shutil.copy(file, tmp_path)
    inputs, expected = call
    np.savez(tmp_path / "in.npz", **inputs)
    words = [sys.executable, "python_ctypes.py", str(masked), "in.npz", "out.npz"]
    done = subprocess.run([*words, "1"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in expected.items()
        }
    np.savez(tmp_path / "in.npz", wrong=np.zeros(1, "float32"))
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr[:7]) == (1, "error: ")


WITHOUT_COMPILER = """
import importlib, sys
from typer.testing import CliRunner

class Absent:
    def find_spec(self, name, *_rest):
        if name.partition(".")[0] in ("tvm", "tvm_ffi", "torch"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Absent())
artifact, out = sys.argv[1:]
for words in (["run"], ["show"], ["stream", "--random", "2"], ["pack", "--out", out], ["bench", "--runs", "2"]):
    command = importlib.import_module(f"dance_tvm.{words[0]}")
    done = CliRunner().invoke(command.app, [artifact, *words[1:]])
    if done.exit_code:
        print(words, done.output, repr(done.exception))
"""


def test_a_program_is_run_shown_packed_and_measured_without_the_compiler(tmp_path):
    folder = built(Counter(), tmp_path / "stream", *torch.zeros(3, 1, 6))
    command = [sys.executable, "-c", WITHOUT_COMPILER, str(folder), str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
    assert list((tmp_path / "packed").rglob("dance_model.h"))


def test_a_phones_library_names_what_it_needs(tmp_path):
    network = nn.Linear(4, 4)
    build_network(network, tmp_path / "a", target="snapdragon", example_inputs=(torch.zeros(1, 4),), check=False)
    shown = subprocess.run(["readelf", "-d", tmp_path / "a/model.so"], capture_output=True, text=True).stdout
    assert "[libc.so]" in shown
    assert "libtvm" not in shown


def test_the_library_needs_nothing(masked):
    shown = subprocess.run(["ldd", masked / "model.so"], capture_output=True, text=True).stdout
    assert "statically linked" in shown or not set(shown.split()) & {
        "libtvm_ffi.so",
        "libtvm_runtime.so",
        "libstdc++.so.6",
    }


@pytest.mark.device
def test_an_emulated_board_gives_the_answers_of_pytorch_without_tvm(tmp_path):
    """The C example, cross-compiled, on the emulated processor: no Python and no TVM there."""
    from dance_tvm.device import emulator

    if reason := emulator.why_no_emulator():
        pytest.skip(f"no emulated device: {reason}")
    torch.manual_seed(0)
    network, inputs = Masked().eval(), (torch.randn(1, 3, 4, 8, 8), torch.randn(1, 5))
    folder = tmp_path / "phone"
    build_network(network, folder, target="aarch64-linux", example_inputs=inputs, threads=2, check=False)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17", "-D_DEFAULT_SOURCE"]
    command = [*zig, *C, str(EXAMPLES / "c/run_clip.c"), "-o", str(tmp_path / "run_clip"), *LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "in.bin").write_bytes(b"".join(each.numpy().tobytes() for each in inputs))
    qemu, *settings = emulator.python_command(emulator.prepare())[:3]
    run = [qemu, *settings, tmp_path / "run_clip", folder, tmp_path / "in.bin", tmp_path / "out.bin"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.frombuffer((tmp_path / "out.bin").read_bytes(), "float32")
    expected = np.concatenate([each.detach().numpy().ravel() for each in network(*inputs)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
