"""LLVM's names of processors by what Linux reports of them, so that this machine is described without loading LLVM.

Taken from LLVM 22 (``llvm/lib/TargetParser/Host.cpp``). A processor that is not here is asked for in LLVM itself.
"""

from __future__ import annotations

#: Of Intel's family 6: name by model.
_INTEL = {
    **dict.fromkeys((0x3C, 0x3F, 0x45, 0x46), "haswell"),
    **dict.fromkeys((0x3D, 0x47, 0x4F, 0x56), "broadwell"),
    **dict.fromkeys((0x4E, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6), "skylake"),
    0xA7: "rocketlake",
    **dict.fromkeys((0x7D, 0x7E), "icelake-client"),
    **dict.fromkeys((0x6A, 0x6C), "icelake-server"),
    **dict.fromkeys((0x8C, 0x8D), "tigerlake"),
    **dict.fromkeys((0x97, 0x9A), "alderlake"),
    **dict.fromkeys((0xB7, 0xBA, 0xBF), "raptorlake"),
    0x8F: "sapphirerapids",
    0xCF: "emeraldrapids",
    0xAD: "graniterapids",
    0xAE: "graniterapids-d",
}
_SKYLAKE_SERVER = 0x55
#: Of AMD: ranges of models with their names, by family.
_AMD = {
    0x17: (
        (range(0x00, 0x30), "znver1"),
        (range(0x30, 0x40), "znver2"),
        (range(0x47, 0x48), "znver2"),
        (range(0x60, 0x80), "znver2"),
        (range(0x90, 0xB0), "znver2"),
    ),
    0x19: (
        (range(0x00, 0x10), "znver3"),
        (range(0x10, 0x20), "znver4"),
        (range(0x20, 0x60), "znver3"),
        (range(0x60, 0x80), "znver4"),
        (range(0xA0, 0xB0), "znver4"),
    ),
    0x1A: ((range(0x00, 0x78), "znver5"),),
}
#: Names of processors for which LLVM takes AVX-512 for granted.
WITH_AVX512 = {
    "skylake-avx512", "cascadelake", "cooperlake", "rocketlake", "icelake-client", "icelake-server", "tigerlake",
    "sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d", "znver4", "znver5",
}  # fmt: skip
WITHOUT_AVX512 = {*_INTEL.values(), "znver1", "znver2", "znver3"} - WITH_AVX512

#: Bytes that one core gets in a cycle from the last level of cache while others use it too, by the beginning of its
#: processor's name, and of others. AMD's manuals say 32; a Zen 5 core alone reads so many, at 4 GHz 130 GB/s, and
#: beside a busy one kernels chosen by 20 are faster than those chosen by 24 or 16.
_L3_BYTES_PER_CYCLE, _L3_BYTES_ELSEWHERE = {"znver": 20.0}, 16.0


def l3_bytes_per_cycle(mcpu: str) -> float:
    """Bytes that one core of a processor, by LLVM's name, gets in a cycle from the last level of cache."""
    found = (read for name, read in _L3_BYTES_PER_CYCLE.items() if mcpu.startswith(name))
    return next(found, _L3_BYTES_ELSEWHERE)


def x86_name(vendor: str, family: int, model: int, flags: set[str]) -> str:
    """LLVM's name of an x86 processor, by the numbers of /proc/cpuinfo; empty where it is not known here."""
    if vendor == "AuthenticAMD":
        return next((name for models, name in _AMD.get(family, ()) if model in models), "")
    if vendor != "GenuineIntel" or family != 6:
        return ""
    if model == _SKYLAKE_SERVER:
        newest = {"avx512_bf16": "cooperlake", "avx512_vnni": "cascadelake"}
        return next((name for flag, name in newest.items() if flag in flags), "skylake-avx512")
    return _INTEL.get(model, "")
