"""Code generation: an object file for each kernel, on all cores; equal kernels once, known ones from the cache.

LLVM takes most of a build's time and memory. A kernel alone needs little memory, and TVM lets other threads run while
it generates code. The object of a kernel is the same whatever it is called: its symbol is made of its hash, and the
names that a network calls it by become further names of that symbol when the library is linked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.target import codegen
from tvm.tirx.build import codegen_build

from dance_tvm.compiler.kernel_cache import KernelCache
from dance_tvm.core.versions import versions

#: What the library's loader puts before a function's name.
SYMBOL = "__tvm_ffi_"

_NAME = "kernel_{}"
_NAME_DIGITS = 32
_PACKAGES = ("apache-tvm", "apache-tvm-ffi")
_RULES = Path(__file__).parents[1] / "schedules"  # TVM asks rules from here what exp and its like are


@dataclass(frozen=True)
class _Kernel:
    """A kernel to compile, under the name that its key gives it."""

    key: str
    func: tirx.PrimFunc
    size: int

    @property
    def name(self) -> str:
        return _NAME.format(self.key[:_NAME_DIGITS])


def compile_kernels(
    kernels: tvm.IRModule,
    target: tvm.target.Target,
    folder: Path,
    cache: KernelCache | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Object files in ``folder``, one for each different PrimFunc of ``kernels``, and the symbol by each name.

    TVM's configuration is that of the current pass context. What ``cache`` holds is taken from there, and what it
    lacks put there.
    """
    config = dict(tvm.transform.PassContext.current().config)
    fixed = _common_key(target, config)
    names: dict[str, str] = {}  # what a kernel is called: its symbol
    wanted: dict[str, _Kernel] = {}
    for var, func in kernels.functions_items():
        kernel = _keyed(func, fixed)
        wanted.setdefault(kernel.key, kernel)
        names[str(func.attrs["global_symbol"]) if "global_symbol" in func.attrs else var.name_hint] = kernel.name
    missing = []
    for kernel in wanted.values():
        code = cache.read(kernel.key) if cache is not None else None
        if code is None:
            missing.append(kernel)
        else:
            _object(kernel, folder).write_bytes(code)
    _compile_all(missing, target, folder, config, cache)
    if cache is not None and missing:
        cache.shrink()
    objects = sorted(str(_object(kernel, folder)) for kernel in wanted.values())
    return objects, {f"{SYMBOL}{name}": f"{SYMBOL}{names[name]}" for name in sorted(names)}


def _keyed(func: tirx.PrimFunc, fixed: str) -> _Kernel:
    text = tvm.ir.save_json(func.with_attr("global_symbol", _NAME.format("")))
    key = hashlib.sha256(f"{fixed}\0{text}".encode()).hexdigest()
    named = _Kernel(key, func, len(text))
    return _Kernel(key, func.with_attr("global_symbol", named.name), len(text))


def _common_key(target: tvm.target.Target, config: dict[str, Any]) -> str:
    """Everything that determines code besides the kernel itself, as the beginning of a cache key."""
    known = versions()
    return json.dumps(
        {
            "target": str(target),
            "config": {key: str(config[key]) for key in sorted(config)},
            # what a target leaves open
            "here": [codegen.llvm_get_system_triple(), codegen.llvm_get_system_cpu()],
            "versions": [known[package] for package in _PACKAGES] + [codegen.llvm_version_major()],
            "rules": _rules_sha256(),
        },
        sort_keys=True,
    )


@lru_cache(maxsize=1)
def _rules_sha256() -> str:
    """Of the code that code generation runs through besides TVM's: this file, and the rules for functions."""
    digest = hashlib.sha256()
    for path in sorted([*_RULES.glob("*.py"), Path(__file__)], key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _compile_all(
    missing: Iterable[_Kernel],
    target: tvm.target.Target,
    folder: Path,
    config: dict[str, Any],
    cache: KernelCache | None,
) -> None:
    """Compile on all cores that this process may use, the large ones first."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "codegen") as pool:
        futures = [
            pool.submit(_compile, kernel, target, folder, config, cache)
            for kernel in sorted(missing, key=lambda kernel: -kernel.size)
        ]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _compile(
    kernel: _Kernel,
    target: tvm.target.Target,
    folder: Path,
    config: dict[str, Any],
    cache: KernelCache | None,
) -> None:
    path = _object(kernel, folder)
    pipeline, finish, _ = tirx.get_default_tir_pipeline(target)
    with target, tvm.transform.PassContext(config=config):
        module = tvm.IRModule({kernel.name: kernel.func})
        module = pipeline(tirx.transform.BindTarget(target.with_host(target))(module))
        # A function that is alone in its module is taken for the library's entry, and there are many here.
        module = finish()(_without(module, "tirx.is_entry_func"))
        codegen_build(module, target).write_to_file(str(path), "o")
    if cache is not None:
        cache.write(kernel.key, path.read_bytes())


def _without(module: tvm.IRModule, attribute: str) -> tvm.IRModule:
    functions = {var: func.without_attr(attribute) for var, func in module.functions_items()}
    return tvm.IRModule(functions, attrs=module.attrs)


def _object(kernel: _Kernel, folder: Path) -> Path:
    return folder / f"{kernel.name}.o"
