"""The cache of compiled kernels: taken from it is what was put there for the very same kernel, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import te

from dance_tvm.artifact import c_interface
from dance_tvm.compiler import kernels as kernels_module
from dance_tvm.compiler.build import build_network
from dance_tvm.compiler.kernel_cache import KernelCache
from dance_tvm.compiler.kernels import compile_kernels
from dance_tvm.compiler.pipeline import Options
from dance_tvm.core.versions import versions
from dance_tvm.device import open_device

HOST = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}


def scaled(factor: float, size: int = 8, name: str = "scaled") -> tvm.IRModule:
    """y = factor * x."""
    x = te.placeholder((size,), name="x")
    func = te.create_prim_func([x, te.compute((size,), lambda i: x[i] * factor, name="y")])
    return tvm.IRModule({name: func.with_attr("global_symbol", name)})


def compiled(
    module: tvm.IRModule, folder: Path, cache: KernelCache, target: dict | None = None, config: dict | None = None
) -> list[str]:
    """Names of the object files for ``module``."""
    folder.mkdir(exist_ok=True)
    with tvm.transform.PassContext(config=config or {}):
        objects, _ = compile_kernels(module, tvm.target.Target(target or HOST), folder, cache)
    return [Path(file).name for file in objects]


@pytest.fixture
def cache(tmp_path) -> KernelCache:
    return KernelCache(tmp_path / "cache")


def kept(cache: KernelCache) -> list[Path]:
    return sorted(cache.folder.glob("*.o")) if cache.folder.is_dir() else []


@pytest.mark.parametrize(
    "changed",
    [
        {"module": scaled(2.5)},
        {"module": scaled(2.0, size=9)},
        {"target": {**HOST, "mcpu": "haswell"}},
        {"target": {**HOST, "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a78"}},
        {"target": {**HOST, "num-cores": 3}},
        {"config": {"tirx.disable_vectorize": True}},
    ],
    ids=lambda changed: str(next(iter(changed))),
)
def test_a_change_of_any_one_input_misses(cache, tmp_path, changed):
    before = compiled(scaled(2.0), tmp_path / "a", cache)
    after = compiled(**{"module": scaled(2.0), **changed}, folder=tmp_path / "b", cache=cache)
    assert len(before) == len(after) == 1
    assert before != after
    assert len(kept(cache)) == 2


@pytest.mark.parametrize("what", ["apache-tvm", "rules", "llvm"])
def test_a_change_of_what_compiles_misses(cache, tmp_path, monkeypatch, what):
    before = compiled(scaled(2.0), tmp_path / "a", cache)
    if what == "rules":
        monkeypatch.setattr(kernels_module, "_rules_sha256", lambda: "other")
    elif what == "llvm":
        monkeypatch.setattr(kernels_module.codegen, "llvm_version_major", lambda: 99)
    else:
        monkeypatch.setattr(kernels_module, "versions", lambda: {**versions(), what: "0.99"})
    assert compiled(scaled(2.0), tmp_path / "b", cache) != before


def test_rules_of_code_generation_are_where_the_key_looks():
    """TVM asks Python functions what exp and its like are: a change of them has to miss."""
    root = Path(kernels_module.__file__).parents[1]
    callers = {
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".py") and re.search(r"\bregister_intrin_lowering\(", Path(folder, name).read_text("utf-8"))
    }
    assert callers <= set((root / "schedules").glob("*.py"))


def test_equal_kernels_are_compiled_once_and_answer_to_both_names(cache, tmp_path):
    both = tvm.IRModule({**dict(scaled(2.0, name="one").functions), **dict(scaled(2.0, name="two").functions)})
    objects, names = compile_kernels(both, tvm.target.Target(HOST), tmp_path, cache)
    assert len(objects) == 1
    assert list(names) == ["__tvm_ffi_one", "__tvm_ffi_two"]
    assert len(set(names.values())) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_file_is_compiled_anew(cache, tmp_path, damage):
    (name,) = compiled(scaled(2.0), tmp_path / "a", cache)
    (path,) = kept(cache)
    content = path.read_bytes()
    if damage == "swap":  # whole, but another kernel's
        compiled(scaled(3.0), tmp_path / "other", cache)
        (other,) = set(kept(cache)) - {path}
        path.write_bytes(other.read_bytes())
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:middle], "empty": b""}[damage])
    compiled(scaled(2.0), tmp_path / "b", cache)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert path.read_bytes() == content


def test_what_was_not_used_for_longest_goes(tmp_path):
    cache = KernelCache(tmp_path, limit=1000)
    for index in range(6):
        cache.write(f"{index:02x}", bytes(150))
        os.utime(tmp_path / f"{index:02x}.o", (index + 1, index + 1))
    assert cache.read("00") == bytes(150)  # used now: the youngest
    abandoned = tmp_path / ".partial-of-a-killed-build"
    abandoned.touch()
    os.utime(abandoned, (0, 0))
    cache.shrink()
    assert [path.stem for path in kept(cache)] == ["00", "03", "04", "05"]
    assert not abandoned.exists()


def test_a_folder_that_others_may_write_or_that_cannot_be_made_is_left_alone(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    cache = KernelCache(shared)
    cache.write("ab", b"code")
    assert cache.read("ab") == b"code"
    shared.chmod(0o777)
    assert cache.read("ab") is None
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    blocked = KernelCache(in_the_way / "kernels")
    blocked.write("ab", b"code")
    blocked.shrink()
    assert blocked.read("ab") is None


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.convs = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convs(x).mean((2, 3, 4))


CLIP = (torch.ones(1, 2, 3, 6, 5),)


def test_a_build_from_the_cache_has_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("DANCE_TVM_KERNELS", str(tmp_path / "kernels"))
    options = Options()
    compilations: list[str] = []
    real = kernels_module._compile
    monkeypatch.setattr(kernels_module, "_compile", lambda *given: (compilations.append(given[0].key), real(*given)))
    sources: list[str] = []
    real_c = c_interface._run_compiler
    monkeypatch.setattr(c_interface, "_run_compiler", lambda *given: (sources.append(given[0]), real_c(*given)))
    built = {}
    for name, chosen in {
        "without": replace(options, cache=False),
        "first": options,
        "second": options,
    }.items():
        compilations.clear()
        sources.clear()
        built[name] = build_network(Small(), tmp_path / name, example_inputs=CLIP, options=chosen).artifact
        assert bool(compilations) is (name != "second")
        assert bool(sources) is (name != "second")
        assert (tmp_path / "kernels").exists() is (name != "without")
    libraries = {artifact.library.read_bytes() for artifact in built.values()}
    assert len(libraries) == 1
    with open_device("local") as device:
        answer = device.load(built["second"]).run({"x": CLIP[0].numpy()})
    np.testing.assert_allclose(answer["output"], Small().eval()(*CLIP).detach().numpy(), rtol=1e-5)


_TWICE = """
import sys
from pathlib import Path
import tvm
from test_kernel_cache import compiled, scaled
from dance_tvm.compiler.kernel_cache import KernelCache
for round in range(8):
    compiled(scaled(float(round)), Path(sys.argv[2]), KernelCache(Path(sys.argv[1]), limit=12000))
"""


def test_two_processes_at_once_share_it(tmp_path):
    """Both write, read and shrink the same folder at the same time, and find the same names for the same kernels."""
    folders = [tmp_path / "one", tmp_path / "two"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _TWICE, str(tmp_path / "cache"), str(folder)],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for folder in folders
    ]
    told = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    one, two = ({path.name: path.read_bytes() for path in folder.glob("*.o")} for folder in folders)
    assert one == two
    assert len(one) == 8
    assert not list((tmp_path / "cache").glob(".partial-*"))
