"""Artifacts for GPUs as programs by the C interface: through OpenCL on PoCL, and a library of libcuda's form."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import counted_alike
from devices import video_artifact
from torch import nn

from dance_tvm import DanceError, Options, build_network, load_artifact, open_device
from dance_tvm.artifact.interface.dance_model import Model, ModelError
from dance_tvm.device import processes
from dance_tvm.machines.gpu import detect_opencl, opencl_library
from dance_tvm.machines.target import Target, load_target

needs_opencl = pytest.mark.skipif(detect_opencl() is None, reason="no OpenCL device: dance-tvm doctor")
needs_nvrtc = pytest.mark.skipif(find_spec("nvidia") is None, reason="no CUDA compiler: pip install 'dance-tvm[gpu]'")
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs the system's C compiler")


class Tally(nn.Module):
    """A stream of frames: a score of this frame and the two before; the states change places."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(6, 3)

    def forward(self, frame: torch.Tensor, last: torch.Tensor, older: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.score(frame + 2 * last - older), frame * 1, last * 1


def tally(out: Path, target: str | Target) -> Path:
    torch.manual_seed(3)
    frames = tuple(torch.zeros(1, 6) for _ in range(3))
    built = build_network(Tally().eval(), out, target=target, example_inputs=frames, options=Options(), check=False)
    return built.artifact.path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """The same masked network for OpenCL and for this processor, with an input of small integers."""
    folder = tmp_path_factory.mktemp("video")
    clip = np.random.default_rng(1).integers(-2, 3, (1, 3, 8, 8, 8)).astype("float32")
    return video_artifact(folder / "gpu", "opencl", size=8), video_artifact(folder / "cpu", size=8), {"clip": clip}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Path:
    return tally(tmp_path_factory.mktemp("stream") / "made", "opencl")


@pytest.fixture
def made(stream) -> Iterator[Model]:
    with Model(stream, 1, driver=opencl_library()) as model:
        yield model


@needs_opencl
def test_a_masked_network_answers_as_on_the_processor_here_and_behind_rpc(video, tmp_path):
    """PoCL's own threads and files stay in the server's process."""
    gpu, processor, inputs = video
    home = Path(str(opencl_library())).parent
    environment = {
        "DANCE_GPU_DRIVER": str(opencl_library()),
        "PYOPENCL_HOME": str(home.parent),
        "LD_LIBRARY_PATH": str(home),
    }
    server, port = processes.start_server(store=tmp_path / "store", environment=environment)
    try:
        for spec in ("local", f"rpc://127.0.0.1:{port}"):
            with open_device("local") as here, open_device(spec) as there:
                on_processor, on_gpu = here.load(processor), there.load(gpu)
                for factor in (1, -1):
                    scaled = {"clip": factor * inputs["clip"]}
                    np.testing.assert_array_equal(on_gpu.run(scaled)["y"], on_processor.run(scaled)["y"])
                assert min(on_gpu.time(inputs, 3)) > 0
                seen = [kernel for kernel in on_gpu.kernels(inputs, 2) if kernel.work]
                told = [kernel for kernel in on_processor.kernels(inputs, 0) if kernel.work]
                assert [each.work["frames"] for each in seen] == [each.work["frames"] for each in told]
                assert all(each.seconds > 0 for each in seen)
    finally:
        server.stop()


@needs_opencl
def test_models_share_a_device_and_its_weights_in_several_threads(video):
    gpu, _, inputs = video
    assert len(counted_alike(gpu, inputs)) == 2
    with Model(gpu.path, 1, driver=opencl_library()) as first:
        expected = first.run(inputs)["y"]
        models = [Model(gpu.path, 1, share=first) for _ in range(2)]
        assert models[0].memory() < first.memory() + 1
        found: list[np.ndarray] = []
        threads = [
            threading.Thread(target=lambda model=model: found.extend(model.run(inputs)["y"] for _ in range(3)))
            for model in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6
    np.testing.assert_array_equal(models[1].run(inputs)["y"], expected)  # the first is gone
    for each in found:
        np.testing.assert_array_equal(each, expected)


@needs_opencl
def test_a_streams_state_stays_on_the_device(made):
    torch.manual_seed(3)
    network, last, older = Tally().eval(), torch.zeros(1, 6), torch.zeros(1, 6)
    for reset in (False, True):
        if reset:
            made.reset()
            last = older = torch.zeros(1, 6)
        for _ in range(4):
            frame = torch.randn(1, 6)
            with torch.no_grad():
                expected, last, older = network(frame, last, older)
            np.testing.assert_allclose(made.step(frame.numpy()), expected.numpy(), atol=1e-5)


@needs_opencl
def test_what_opencl_lacks_is_told_in_a_sentence(stream):
    with pytest.raises(ModelError, match=r"there is no OpenCL device with Adreno in its name"):
        Model(stream, driver=opencl_library(), device="Adreno")
    with pytest.raises(ModelError, match=r"/nowhere/libOpenCL.so cannot be loaded"):
        Model(stream, driver="/nowhere/libOpenCL.so")
    with pytest.raises(ModelError, match=r"driver is too old: it lacks clGetPlatformIDs"):
        Model(stream, driver="libm.so.6")


# A library of libcuda's form, whose kernels do nothing; FAKE says what it lacks.
DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int held, launches, pushed;
static int is(const char *what) { return getenv("FAKE") && !strcmp(getenv("FAKE"), what); }
int fake_held(void) { return held; }
int fake_launches(void) { return launches; }
int fake_pushed(void) { return pushed; }
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { return *count = !is("no device"), 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetName(char *name, int room, int device) { return snprintf(name, room, "Fake %d", device), 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  *value = which == 75 ? (is("old") ? 3 : 5) : 3 + device;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return held++, *context = &held + device, 0; }
int cuDevicePrimaryCtxRelease(int device) { return held--, device; }
int cuCtxPushCurrent_v2(void *context) { return pushed++, context != &held; }
int cuCtxPopCurrent_v2(void **context) { return pushed--, *context = &held, 0; }
int cuModuleLoadDataEx(void **module, const void *code, unsigned count, int *options, void **values) {
  (void)options, (void)values;
  if (is("old driver")) return 222;
  if (count != 2 || !strstr(code, ".target sm_53")) return 218;
  return held++, *module = &held, 0;
}
int cuModuleUnload(void *module) { return held--, module != &held; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  return *function = module, strstr(name, "_kernel") ? 0 : 500;
}
int cuMemAlloc_v2(uint64_t *memory, size_t bytes) {
  if (is("full")) return 2;
  return held++, *memory = (uint64_t)(uintptr_t)calloc(1, bytes), 0;
}
int cuMemFree_v2(uint64_t memory) { return held--, free((void *)(uintptr_t)memory), 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
  return memcpy((void *)(uintptr_t)to, from, bytes), !stream;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
  return memcpy(to, (void *)(uintptr_t)from, bytes), !stream;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
  return memmove((void *)(uintptr_t)to, (void *)(uintptr_t)from, bytes), !stream;
}
int cuStreamCreate(void **stream, unsigned flags) { return held++, *stream = &launches, flags != 1; }
int cuStreamSynchronize(void *stream) { return stream != &launches; }
int cuStreamDestroy_v2(void *stream) { return held--, stream != &launches; }
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **given, void **extra) {
  launches++;
  return !(function && gx && gy && gz && bx && by && bz && !shared && stream && *(uint64_t *)given[0] && !extra);
}
int cuGetErrorString(int code, const char **text) { return *text = code == 999 ? "unknown error" : "it failed", 0; }
"""


@pytest.fixture(scope="module")
def cuda(tmp_path_factory) -> tuple[Path, ctypes.CDLL]:
    """An artifact for a Jetson Nano's GPU beside this processor, and the driver."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "driver.c").write_text(DRIVER)
    library = folder / "libcuda.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", folder / "driver.c", "-o", library], check=True)
    nano, here = load_target("jetson-nano"), load_target("opencl")
    target = nano.model_copy(update={"host": here.host, "link": here.link, "name": "nano-here"})
    return tally(folder / "made", target), ctypes.CDLL(str(library))


@needs_nvrtc
@needs_cc
def test_cudas_driver_is_called_as_it_wants_and_given_all_back(cuda):
    folder, driver = cuda
    with Model(folder, 1, driver=driver._name) as model:
        frame, zeros = np.ones((1, 6), "float32"), np.zeros((1, 6), "float32")
        inputs = dict(zip(model.inputs, (frame, zeros, zeros), strict=True))
        score, last, older = model.run(inputs).values()
        assert not score.any(), "its kernels write nothing"
        np.testing.assert_array_equal((last, older), (frame, zeros))  # the network hands them on
        started = driver.fake_launches()
        assert started >= 1
        model.profile()
        model.step(frame)
        assert driver.fake_launches() == 2 * started
        assert len(model.layers()) <= started
        watched: list[np.ndarray] = []
        model.watch(inputs, lambda _kernel, tensors: watched.extend(each.copy() for each in tensors))
        assert any((each == 1).all() for each in watched), "the frame was brought there and back"
        second = Model(folder, 1, share=model)
    second.close()
    assert driver.fake_held() == 0
    assert driver.fake_pushed() == 0


@needs_nvrtc
@needs_cc
@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("no device", "there is no NVIDIA GPU here: build for a processor"),
        ("old", "Fake 0 is older than sm_53, which the model is built for: build it for this GPU"),
        ("old driver", "the driver of Fake 0 is too old for this model's PTX: update it"),
        ("full", "Fake 0 cannot hold the model's tensors: it is out of memory"),
    ],
)
def test_what_cuda_lacks_is_told_in_a_sentence(cuda, monkeypatch, lacking, said):
    folder, driver = cuda
    monkeypatch.setenv("FAKE", lacking)
    monkeypatch.setenv("DANCE_GPU_DRIVER", driver._name)
    artifact = load_artifact(folder)
    with open_device("local") as device, pytest.raises(DanceError, match=said):
        device.load(artifact)
    assert driver.fake_held() == 0


def test_without_any_driver_a_sentence_says_what_to_install(cuda, stream, monkeypatch):
    monkeypatch.delenv("DANCE_GPU_DRIVER", raising=False)
    for folder, name in ((cuda[0], "libcuda.so.1"), (stream, "libOpenCL.so.1")):
        try:
            ctypes.CDLL(name)
        except OSError:
            with pytest.raises(ModelError, match=r"there is no .* here \(lib.*\): install"):
                Model(folder)
