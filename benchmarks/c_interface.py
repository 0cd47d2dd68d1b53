"""Does the C interface hold: damaged files, a thousand models, and its own code under sanitizers and valgrind.

    python -m benchmarks.c_interface fuzz        every one of 10,000 changes of weights and of library is refused
    python -m benchmarks.c_interface leaks       1,000 models leave no memory, threads or descriptors
    python -m benchmarks.c_interface sanitize    create, 100 runs, 4 models in 4 threads, destroy

A small network with masks is built for it. ``sanitize`` needs gcc, and valgrind for its last part; kernels are compiled
for AVX2 at most, which is what valgrind knows.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn

from dance_tvm import DanceError, Options, import_model
from dance_tvm.artifact.c_interface import INTERFACE
from dance_tvm.artifact.folder import Artifact
from dance_tvm.artifact.interface.dance_model import Model, ModelError
from dance_tvm.compiler.build import new_manifest
from dance_tvm.compiler.code import compile_lowered
from dance_tvm.compiler.pipeline import lower
from dance_tvm.compiler.program import program_objects, write_program
from dance_tvm.lowering import share_memory
from dance_tvm.lowering.choose_kernel import Memory
from dance_tvm.machines.target import Target, load_target

MemoryOption = Annotated[Memory, typer.Option(help="as of `build`")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

DRIVER = """
#define DANCE_MODEL_NO_OPEN
#include "dance_model.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const dance_api *api;
static char *weights;

static dance_model *made(dance_model *share) {
  char error[512];
  dance_options options = {.size = sizeof options, .threads = 3, .weights_path = weights, .share = share};
  dance_model *model = api->create(&options, error, sizeof error);
  if (!model) puts(error), exit(2);
  return model;
}

static void *run(void *given) {
  dance_model *model = given ? made(given) : made(NULL);
  const dance_tensor *inputs, *outputs;
  const int32_t in = api->inputs(&inputs), out = api->outputs(&outputs);
  const void *from[8];
  void *to[8];
  for (int32_t each = 0; each < in; each++) from[each] = calloc(1, inputs[each].bytes);
  for (int32_t each = 0; each < out; each++) to[each] = malloc(outputs[each].bytes);
  for (int times = 0; times < 100; times++) {
    if (times % 10 == 5 && api->profile(model, times % 20 == 15)) puts(api->error(model)), exit(3);
    if (api->run(model, from, to)) puts(api->error(model)), exit(3);
  }
  const int64_t *macs;
  int64_t counted = 0;
  for (int32_t steps = api->work(model, &macs); steps--;) counted += macs[steps] > 0;
  if (!counted) puts("nothing was counted"), exit(4);
  for (int32_t each = 0; each < in; each++) free((void *)from[each]);
  for (int32_t each = 0; each < out; each++) free(to[each]);
  api->destroy(model);
  return NULL;
}

int main(int count, char **words) {
  pthread_t threads[4];
  weights = count > 1 ? words[1] : NULL;
  api = dance_model_api(DANCE_VERSION);
  run(NULL);
  dance_model *first = made(NULL);
  for (int each = 0; each < 4; each++) pthread_create(&threads[each], NULL, run, each % 2 ? first : NULL);
  for (int each = 0; each < 4; each++) pthread_join(threads[each], NULL);
  api->destroy(first);
  puts("done");
  return 0;
}
"""

OPENER = """
#include "dance_model.h"

int opens(const char *path, char *error) { return dance_model_open(path, error, 512) != NULL; }
"""


class Masked(nn.Module):
    """Two convolutions, the second under a mask; weights of every form: packed, transformed, sparse, lists."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 16, 3, padding=1)
        self.second = nn.Conv3d(16, 24, (1, 3, 3), padding=(0, 1, 1))
        self.score = nn.Linear(24, 64)
        self.score.weight.data[torch.rand_like(self.score.weight) < 0.6] = 0

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.first(clip))
        mask = (features.mean((2, 3, 4), keepdim=True) > 0).float()
        return self.score(torch.relu(self.second(features * mask)).mean((2, 3, 4)))


def build(target: Target, folder: Path, memory: Memory) -> Artifact:
    """The network with its weights in a file; in small memory, some of them are transformed in every call."""
    torch.manual_seed(0)
    share_memory.SMALL_BYTES = 0  # else so small a network has room for all of them
    imported = import_model(Masked().eval(), example_inputs=(torch.randn(1, 3, 4, 8, 8),))
    options = Options(threads=2, conv="winograd", memory=memory)
    lowered = lower(imported.mod, target, options)
    if any("transform_weights" in name for name in lowered.kernels) != (memory == "small"):
        raise DanceError(f"--memory {memory}: this network does not show what it is here for")
    (folder / "objects").mkdir()
    code = compile_lowered(lowered, target, options, folder / "objects")
    manifest = new_manifest(imported, target, options)
    program_objects(lowered, code, manifest, target, options, folder / "objects", most_inline=0)
    return write_program(folder / "artifact", lowered, code, manifest, target, options, most_inline=0)


@app.command()
def fuzz(changes: int = 10_000, seed: int = 0, memory: MemoryOption = "balanced") -> None:
    """Change the file of weights, then the library, as often; every change must be refused in a sentence.

    The library is opened from Python, and by `dance_model.h`, compiled with the system's compiler."""
    with tempfile.TemporaryDirectory() as name:
        folder = build(load_target("host"), Path(name), memory).path
        opened = _header_opens(Path(name))

        def library_opens() -> None:
            with contextlib.suppress(ModelError):
                opened(folder / "model.so")
                raise DanceError("dance_model.h opens a changed library")
            Model(folder, 1).close()

        weights = folder / "weights.safetensors"
        header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        _refused(weights, header, lambda: Model(folder, 1).close(), changes, seed)
        _refused(folder / "model.so", 4096, library_opens, changes, seed)


def _header_opens(folder: Path) -> Callable[[Path], None]:
    """What raises ModelError with the sentence of `dance_model_open`."""
    (folder / "open.c").write_text(OPENER)
    told(["cc", "-std=c11", "-O2", f"-I{INTERFACE}", "-shared", "-fPIC", "open.c", "-o", "open.so", "-ldl"], folder)
    opens = ctypes.CDLL(str(folder / "open.so")).opens

    def opened(library: Path) -> None:
        said = ctypes.create_string_buffer(512)
        if not opens(str(library).encode(), said):
            raise ModelError(said.value.decode())

    return opened


def _refused(path: Path, header: int, opened: Callable[[], None], changes: int, seed: int) -> None:
    """Print what was said of so many changes. Raises DanceError where one was taken."""
    random, sound, said = np.random.default_rng(seed), path.read_bytes(), dict[str, int]()
    for number in range(changes):
        path.write_bytes(changed(sound, header, random))
        try:
            opened()
        except ModelError as error:
            said[str(error)] = said.get(str(error), 0) + 1
        else:
            raise DanceError(f"change {number} of seed {seed} was not refused")
    path.write_bytes(sound)
    for sentence, times in said.items():
        print(f"{times} x {sentence}")
    print(f"{path.name}: {sum(said.values())} of {changes} changes refused")


def changed(sound: bytes, header: int, random: np.random.Generator) -> bytes:
    """Bits turned in the first ``header`` bytes or anywhere, pieces zeroed, moved, cut or added."""
    data = bytearray(sound)
    border = header if random.random() < 0.5 else len(data)
    kind = random.integers(0, 5)
    begin = int(random.integers(0, border))
    if kind == 0:
        data[begin] ^= 1 << int(random.integers(0, 8))
    elif kind == 1:
        for place in random.integers(0, border, 5):
            data[place] = (data[place] + int(random.integers(1, 256))) % 256
        data[0] ^= data == sound
    elif kind == 2:
        del data[begin : begin + int(random.integers(1, 5000))]
    elif kind == 3:
        data[begin:begin] = random.bytes(int(random.integers(1, 5000)))
    else:
        piece = random.bytes(16)
        data[begin : begin + 16] = piece if data[begin : begin + 16] != piece else bytes(16)
        del data[len(sound) :]
    return bytes(data)


@app.command()
def leaks(models: int = 1000, memory: MemoryOption = "balanced") -> None:
    """Create, run, destroy; print resident memory, threads and descriptors after the first hundred and at the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = build(load_target("host"), Path(name), memory).path

        def once() -> None:
            with Model(folder, 3) as model:
                model.run({key: np.zeros(shape, dtype) for key, (shape, dtype) in model.inputs.items()})

        for number in range(1, models + 1):
            once()
            if number in (min(100, models), models):
                print(f"after {number} models: {kept()}")


def kept() -> str:
    """Of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = len(list(Path("/proc/self/fd").iterdir()))
    return f"{lines['VmRSS'].strip()} resident, {lines['Threads'].strip()} threads, {files} descriptors"


@app.command()
def sanitize(memory: MemoryOption = "balanced") -> None:
    """Compile the library's own code with sanitizers, and run it; then under valgrind."""
    host = load_target("host")
    target = host.model_copy(update={"tvm": {**host.tvm, "mcpu": "haswell"}})
    with tempfile.TemporaryDirectory() as name:
        artifact = build(target, Path(name), memory)
        objects = artifact.path.parent / "objects"
        (objects / "driver.c").write_text(DRIVER)
        sources = [*map(str, sorted(objects.glob("*.c"))), "kernels.o"]
        for kinds in ("address,undefined", "thread", ""):
            program = objects / f"driver-{kinds or 'plain'}"
            flags = [f"-fsanitize={kinds}", "-fno-sanitize-recover=all"] if kinds else []
            compile_flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-mavx2", f"-I{INTERFACE}", "-I."]
            told(["gcc", *compile_flags, *flags, *sources, "-o", str(program), "-lm", "-lpthread"], objects)
            run = [str(program), str(artifact.path / "weights.safetensors")]
            if kinds:
                print(f"{kinds}: {told(run, objects)}")
            elif shutil.which("valgrind"):
                checks = ["valgrind", "--quiet", "--leak-check=full", "--error-exitcode=9", *run]
                print(f"valgrind: {told(checks, objects)}")


def told(command: list[str], folder: Path) -> str:
    """What a program prints. Raises DanceError where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise DanceError(f"{command[0]} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return (done.stdout + done.stderr).strip()


if __name__ == "__main__":
    app()
