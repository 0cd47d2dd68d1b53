"""What an artifact costs in a C program: disk, opening, first call, memory; and its time against the virtual machine.

    python -m benchmarks.c_costs cost ARTIFACT ...               bytes, seconds, resident memory, as shares of weights
    python -m benchmarks.c_costs speed MODEL [--memory ...]      calls in turns with TVM's virtual machine
    python -m benchmarks.c_costs modes ARTIFACT ARTIFACT ...     calls of several artifacts of a network in turns

``cost`` compiles a program with the system's compiler and runs it in a process of its own for each figure, the file in
the system's cache.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import tvm
import typer
from tvm import relax

from dance_tvm import DanceError, Options, build_network, import_model
from dance_tvm.artifact.c_interface import INTERFACE
from dance_tvm.artifact.interface.dance_model import Model
from dance_tvm.compiler.pipeline import lower
from dance_tvm.core.random_inputs import random_inputs
from dance_tvm.lowering.choose_kernel import Memory
from dance_tvm.machines.target import load_target

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

DRIVER = r"""
#include "dance_model.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

static long kib(const char *name) {
  char line[256];
  long found = 0;
  FILE *status = fopen("/proc/self/status", "r");
  while (fgets(line, sizeof line, status))
    if (!strncmp(line, name, strlen(name))) found = atol(line + strlen(name) + 1);
  fclose(status);
  return found;
}

int main(int count, char **words) {
  char error[512];
  const void *from[8];
  void *to[8];
  const dance_tensor *inputs, *outputs;
  const double start = now();
  const dance_api *api = dance_model_open(words[1], error, sizeof error);
  if (!api) return puts(error), 2;
  dance_options options = {.size = sizeof options, .threads = atoi(words[3]), .weights_path = words[2]};
  options.verified = count > 4;
  dance_model *model = api->create(&options, error, sizeof error);
  if (!model) return puts(error), 2;
  const double open = now();
  const int32_t in = api->inputs(&inputs), out = api->outputs(&outputs);
  for (int32_t each = 0; each < in; each++) from[each] = calloc(1, inputs[each].bytes);
  for (int32_t each = 0; each < out; each++) to[each] = calloc(1, outputs[each].bytes);
  if (api->run(model, from, to)) return puts(api->error(model)), 3;
  const double first = now();
  if (api->run(model, from, to)) return puts(api->error(model)), 3;
  printf("{\"open\": %f, \"first\": %f, ", open - start, first - open);
  printf("\"resident\": %ld, \"peak\": %ld}\n", kib("VmRSS:"), kib("VmHWM:"));
  api->destroy(model);
  return 0;
}
"""


@app.command()
def cost(artifacts: list[Path], threads: int = 2, weights_mb: float = 0.0, runs: int = 5) -> None:
    """Print what each costs; ``weights_mb``: of the network as it was trained, else those of the prepared layers."""
    with tempfile.TemporaryDirectory() as name:
        program = Path(name) / "driver"
        (Path(name) / "driver.c").write_text(DRIVER)
        command = [
            "cc",
            "-std=gnu11",
            "-O2",
            f"-I{INTERFACE}",
            f"{program}.c",
            "-o",
            program,
            "-ldl",
            "-lm",
            "-lpthread",
        ]
        subprocess.run(command, check=True)
        for path in artifacts:
            disk = sum(
                (path / file).stat().st_size for file in ("model.so", "weights.safetensors") if (path / file).exists()
            )
            for verified in (False, True):
                told = [_once(program, path, threads, verified) for _ in range(runs)]
                least = {key: min(each[key] for each in told) for key in told[0]}
                resident, peak = (least[key] / 1024 for key in ("resident", "peak"))
                share = (
                    f", {resident / weights_mb:.2f} and {peak / weights_mb:.2f} of the weights" if weights_mb else ""
                )
                disk_share = f" ({disk / 2**20 / weights_mb:.3f} of the weights)" if weights_mb else ""
                print(
                    f"{path.name}{', verified before' if verified else ''}: {disk / 2**20:.1f} MiB{disk_share}; open "
                    f"{least['open']:.3f} s, first call {least['first']:.3f} s; resident {resident:.0f} MiB, at most "
                    f"{peak:.0f}{share}"
                )


def _once(program: Path, artifact: Path, threads: int, verified: bool) -> dict[str, float]:
    words = [program, artifact / "model.so", artifact / "weights.safetensors", str(threads), *(["verified"] * verified)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise DanceError(f"{artifact}: {done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


@app.command()
def speed(
    model: str,
    threads: int = 2,
    rounds: int = 30,
    memory: Annotated[str, typer.Option(help=", ".join(get_args(Memory)))] = Options().memory,
) -> None:
    """The network's shortest call as an artifact over its shortest under TVM's virtual machine, timed in turns."""
    options = Options(threads=threads, memory=memory)  # one of Memory: the help lists them
    imported, target = import_model(model), load_target("host")
    arrays = random_inputs(imported.inputs)
    lowered = lower(imported.mod, target, options)
    machine = relax.VirtualMachine(tvm.compile(lowered.mod, target.tvm_target(threads)), tvm.cpu())
    given = [tvm.runtime.tensor(array) for array in (*arrays.values(), *lowered.weights.values())]
    tvm.get_global_func("runtime.config_threadpool")(-1, threads)
    main = machine["main"]
    with tempfile.TemporaryDirectory() as folder:
        artifact = build_network(imported, Path(folder) / "artifact", options=options, check=False).artifact
        with Model(artifact.path, threads) as program:
            _turns(
                {"artifact": partial(_shortest, program, arrays), "virtual machine": lambda: _timed(main, given)},
                rounds,
            )


@app.command()
def modes(artifacts: list[Path], threads: int = 2, rounds: int = 30) -> None:
    """The shortest calls of artifacts of one network, timed in turns."""
    models = {str(path): Model(path, threads) for path in artifacts}
    first = models[str(artifacts[0])]
    arrays = {name: np.ones(shape, dtype) for name, (shape, dtype) in first.inputs.items()}
    _turns({name: partial(_shortest, model, arrays) for name, model in models.items()}, rounds)


def _shortest(model: Model, arrays: dict[str, np.ndarray]) -> float:
    return model.time(arrays, 1)[0]


def _timed(main: Callable[..., object], given: list[object]) -> float:
    start = time.perf_counter()
    main(*given)
    return time.perf_counter() - start


def _turns(contenders: dict[str, Callable[[], float]], rounds: int) -> None:
    """Print the shortest and median call of each, and the least processor time of one, which other programs disturb
    less."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            begun = time.process_time()
            seconds[name].append(call())
            processor[name].append(time.process_time() - begun)
    last = list(contenders)[-1]
    for name, each in seconds.items():
        shares = [min(times[name]) / min(times[last]) for times in (seconds, processor)]
        least, middle, spent = 1e3 * min(each), 1e3 * float(np.median(each)), 1e3 * min(processor[name])
        print(
            f"{name}: shortest {least:.3f} ms ({shares[0]:.3f} of the last), median {middle:.3f} ms, "
            f"processor {spent:.3f} ms ({shares[1]:.3f})"
        )


if __name__ == "__main__":
    app()
