"""The pool of threads that an artifact runs on, in a C program of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dance_tvm.artifact.c_interface import INTERFACE
from dance_tvm.core import versions

PROGRAM = r"""
#include "threads.c"
#include <stdio.h>

#define MOST 300000
static _Atomic int32_t times[MOST], inner;
static pool threads;

static int fails(int task, parallel_env *env, void *closure) {
  const char *parts[] = {"task ", "seven"};
  (void)env, (void)closure;
  if (task != 7) return 0;
  TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 2);
  return -1;
}

static int within(int task, parallel_env *env, void *closure) {
  (void)task, (void)env, (void)closure;
  atomic_fetch_add(&inner, 1);
  return 0;
}

static int counts(int task, parallel_env *env, void *closure) {
  if (env->tasks != *(int *)closure && *(int *)closure) return -1;
  atomic_fetch_add(&times[task], 1);
  if (task == 2) usleep(300); /* the others go on without it */
  return task == 3 ? run_loop(within, NULL, 5) : 0;
}

static int check(int tasks, int asked) {
  for (int each = 0; each < tasks; each++)
    if (atomic_exchange(&times[each], 0) != 1) return printf("task %d of %d, %d asked\n", each, tasks, asked), 1;
  return 0;
}

int main(void) {
  static const dance_options options;
  static const int sizes[] = {1, 2, 3, 5, 7, 8, 64, 1000, 65535, 65536, MOST};
  for (int size = 1; size <= 5; size++) {
    memset(&threads, 0, sizeof threads);
    if (start_pool(&threads, size, &options, NULL, 0)) return puts("no pool"), 1;
    seat before = enter(&threads);
    for (int round = 0; round < 40; round++) {
      for (int each = 0; each < 8 + 3 * (round % 20 == 0); each++) {
        int tasks = sizes[each], loops = tasks > 3 ? 5 : 0;
        atomic_store(&inner, 0);
        if (run_loop(counts, &tasks, tasks) || check(tasks, tasks)) return 1;
        if (atomic_load(&inner) != loops) return puts("a loop inside a task"), 1;
      }
      int any = 0;
      if (run_loop(counts, &any, 0) || check(size > 1 ? PARTS * size : 1, 0)) return 1;
      if (!run_loop(fails, NULL, 20) || strcmp(kernel_error(), "task seven")) return puts("no failure"), 1;
      if (round % 10 == 0) usleep(2000); /* they sleep */
    }
    leave(before);
    end_pool(&threads);
  }
  puts("every task once");
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs the system's C compiler")
@pytest.mark.parametrize("sanitizer", ["undefined", "thread"])
def test_every_task_of_a_loop_runs_once(tmp_path: Path, sanitizer: str) -> None:
    (tmp_path / "pool.c").write_text(PROGRAM)
    flags = [
        "-std=c11",
        "-D_GNU_SOURCE",
        "-O1",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        f"-I{INTERFACE}",
    ]
    command = ["cc", *flags, str(tmp_path / "pool.c"), "-o", str(tmp_path / "pool"), "-lpthread"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([tmp_path / "pool"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "every task once\n"), done.stderr


def test_artifacts_made_with_another_runtime_are_not_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "core" / "versions.py"))
    found = set()
    for source in ("int a;", "int b;"):
        (tmp_path / "threads.c").write_text(source)
        versions._sources_sha256.cache_clear()
        found.add(versions.versions()["sources"])
    versions._sources_sha256.cache_clear()
    assert len(found) == 2
