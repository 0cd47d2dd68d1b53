"""What this machine is: instruction set, cores and caches, read from the kernel and from LLVM."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from dance_tvm.core.errors import DanceError
from dance_tvm.machines.processors import WITH_AVX512, WITHOUT_AVX512, x86_name

CPUS = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")

# Processors whose 512-bit multiply-adds issue once a cycle (two 256-bit halves); other AVX-512 servers issue two.
ONE_WIDE_FMA = {"znver4"}

# Instruction sets that generated code may use, as LLVM names them and as Linux lists them in /proc/cpuinfo.
FEATURES = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi2": "bmi2",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "fullfp16": "asimdhp",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "lse": "atomics",
}


def detect() -> dict[str, Any]:
    """The fields of a Target that describe this machine; raises DanceError on an architecture without kernels."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        facts = _x86()
    elif machine in ("aarch64", "arm64"):
        facts = _aarch64()
    else:
        raise DanceError(f"this machine is {machine!r}: host builds need x86-64 or aarch64; cross-build by --target")
    facts["caches"] = _caches()
    facts["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    facts["threads"] = available_cores()
    facts["sources"] = {
        "tvm": "LLVM's name for this processor",
        "clusters": "/proc/cpuinfo and cpufreq; multiply-adds per cycle by processor family",
        "caches": "/sys/devices/system/cpu/cpu0/cache",
    }
    return facts


def available_cores() -> int:
    """Cores that this process may use: its affinity mask, cut by the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no control groups of version 2: the affinity mask says it all
    return cores


def cpu_flags() -> set[str]:
    """Instruction sets of this processor as Linux lists them; empty where it does not."""
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def needed_flags(target: Any) -> list[str]:
    """Instruction sets, named as Linux does, that code for a TVM target on LLVM may use."""
    from tvm.target import codegen

    cpu = target.host if target.kind.name != "llvm" else target
    have = {str(feature) for feature in codegen.llvm_get_cpu_features(cpu)}
    return sorted(flag for feature, flag in FEATURES.items() if feature in have)


def _x86() -> dict[str, Any]:
    flags = cpu_flags()
    mcpu = _llvm_cpu()
    if "avx512f" in flags:
        level, floats, registers, rate = (
            "avx512",
            16,
            32,
            1.0 if mcpu in ONE_WIDE_FMA else 2.0,
        )
    elif {"avx2", "fma"} <= flags:
        level, floats, registers, rate = "avx2", 8, 16, 2.0
        # A hypervisor may hide instructions that LLVM expects of this model: then take the plain level.
        mcpu = "haswell" if _has_avx512(mcpu) else mcpu
    else:
        level, floats, registers, rate, mcpu = (
            "sse",
            4,
            16,
            1.0,
            "x86-64-v2" if "sse4_2" in flags else "x86-64",
        )
    halves = level == "avx512" and "avx512_fp16" in flags
    return {
        "tvm": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu},
        "tuning_log": f"host-x86-64-{level}",
        "link": {"machine": "x86_64"},
        "vector": {"floats": floats, "registers": registers, "fp16": halves},
        "half_features": ["avx512fp16"] if halves else [],
        "clusters": [_cluster(_cpuinfo("model name") or mcpu, available_cores(), mcpu, _ghz(0), rate)],
    }


def _aarch64() -> dict[str, Any]:
    mcpu = _llvm_cpu()
    by_clock: dict[float, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        by_clock[_ghz(cpu)] = by_clock.get(_ghz(cpu), 0) + 1
    return {
        "tvm": {
            "kind": "llvm",
            "mtriple": "aarch64-linux-gnu",
            "mcpu": mcpu,
            "mattr": ["-sve", "-sve2"],
        },
        "tuning_log": "host-aarch64",
        "link": {"machine": "aarch64", "page_size": 65536},
        "vector": {"floats": 4, "registers": 32, "fp16": "asimdhp" in cpu_flags()},
        "clusters": [_cluster(mcpu, by_clock[clock], mcpu, clock, 2.0) for clock in sorted(by_clock, reverse=True)],
    }


def _cluster(name: str, cores: int, mcpu: str, ghz: float, rate: float) -> dict[str, Any]:
    return {
        "name": name,
        "cores": cores,
        "mcpu": mcpu,
        "max_ghz": ghz,
        "fma_per_cycle": rate,
    }


def _llvm_cpu() -> str:
    """LLVM's name of this processor; only one that is new to us is worth the seconds that loading LLVM takes."""
    numbers = [_cpuinfo(key) for key in ("cpu family", "model")]
    if all(number.isdigit() for number in numbers):
        family, model = map(int, numbers)
        if name := x86_name(_cpuinfo("vendor_id"), family, model, cpu_flags()):
            return name
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu()) or "generic"


def _has_avx512(mcpu: str) -> bool:
    """Whether LLVM takes AVX-512 for granted on a processor of this name."""
    if mcpu in WITH_AVX512 | WITHOUT_AVX512:
        return mcpu in WITH_AVX512
    from tvm.target import Target, codegen

    target = Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu})
    return bool(codegen.llvm_cpu_has_features("avx512f", target))


def _cpuinfo(key: str) -> str:
    try:
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass  # no /proc: callers fall back to LLVM's name
    return ""


def _ghz(cpu: int) -> float:
    """Highest clock of one processor, to a tenth, since kernels without cpufreq show the momentary clock instead."""
    try:
        return round(int((CPUS / f"cpu{cpu}/cpufreq/cpuinfo_max_freq").read_text()) / 1e6, 1)
    except (OSError, ValueError):
        return round(float(_cpuinfo("cpu MHz") or 2000.0) / 1e3, 1)


def _caches() -> dict[str, int]:
    """Sizes in bytes; the common smallest sizes stand in where the kernel reports nothing (as in some containers)."""
    sizes = {"l1d": 32 * 1024, "l2": 256 * 1024, "l3": 0}
    for index in sorted((CPUS / "cpu0/cache").glob("index*")):
        try:
            level, kind = (
                (index / "level").read_text().strip(),
                (index / "type").read_text().strip(),
            )
            size = int((index / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
        if kind != "Instruction":
            sizes["l1d" if level == "1" else f"l{level}"] = size
    return {key: sizes[key] for key in ("l1d", "l2", "l3")}
