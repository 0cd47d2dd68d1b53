"""Targets: validated facts, names and aliases, and the detection of this machine."""

from __future__ import annotations

import pytest

from dance_tvm.core.errors import DanceError
from dance_tvm.machines import host
from dance_tvm.machines.target import TARGETS, all_targets, load_target

CUSTOM = """
name = "board"
description = "A board"
threads = 2
memory_gib = 2.0
memory_gb_per_s = 10.0
[tvm]
kind = "llvm"
mtriple = "aarch64-linux-gnu"
[link]
machine = "aarch64"
[[clusters]]
name = "A53"
cores = 4
mcpu = "cortex-a53"
max_ghz = 1.2
fma_per_cycle = 1.0
[caches]
l1d = 32768
l2 = 524288
l3 = 0
[vector]
floats = 4
registers = 32
[energy]
pj_per_mac = 20.0
pj_per_byte = 100.0
[sources]
clusters = "a test"
"""


def test_snapdragon_is_the_8_gen_1():
    target = load_target("snapdragon")
    assert [(cluster.mcpu, cluster.cores) for cluster in target.clusters] == [
        ("cortex-x2", 1),
        ("cortex-a710", 3),
        ("cortex-a510", 4),
    ]
    attributes = target.tvm_target(3).attrs
    assert attributes["mtriple"] == "aarch64-linux-android"
    assert set(attributes["mattr"]) == {"-sve", "-sve2"}
    assert attributes["num-cores"] == 3
    # One X2 with four pipes and three A710 with two, four floats each, two operations a multiply-add.
    assert target.peak_gflops == pytest.approx(8 * (3.0 * 4 + 3 * 2.5 * 2))


@pytest.mark.parametrize(("alias", "name"), [("SM8450", "snapdragon"), ("arm64", "aarch64-linux"), ("native", "host")])
def test_an_alias_names_the_same_target(alias, name):
    assert load_target(alias) == load_target(name)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("snapdragn", "did you mean 'snapdragon'"), ("aarch-linux", "'aarch64-linux'"), ("zzz", "known")],
)
def test_an_unknown_target_suggests_the_nearest(wrong, hint):
    with pytest.raises(DanceError, match=hint):
        load_target(wrong)


def test_a_toml_path_is_a_target(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(CUSTOM)
    target = load_target(path)
    assert target.name == "board"
    assert target.tuning_log == "board"
    assert target.threads == 2


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("threads = 2", "threads = 0", "threads"),
        ("threads = 2", "", "threads"),
        ("floats = 4", "floats = 4\nlanes = 8", "vector.lanes"),
        ("cores = 4", 'cores = "many"', "clusters.0.cores"),
        ('name = "board"', "name = board", "TOML"),
    ],
)
def test_a_wrong_file_is_told_by_its_field(tmp_path, old, new, named):
    path = tmp_path / "board.toml"
    path.write_text(CUSTOM.replace(old, new))
    with pytest.raises(DanceError, match=named):
        load_target(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(DanceError, match="no target file"):
        load_target(tmp_path / "nothing.toml")


def test_every_fact_of_every_target_has_a_source():
    for target in all_targets():
        assert target.sources
        assert "estimate" in target.sources["energy"]
    assert {target.name for target in all_targets()} == {path.stem for path in TARGETS.glob("*.toml")}


def test_the_fingerprint_follows_what_matters_for_tuning_only(tmp_path):
    path = tmp_path / "board.toml"

    def fingerprint(old, new):
        path.write_text(CUSTOM.replace(old, new))
        return load_target(path).fingerprint

    same = fingerprint("", "")
    assert fingerprint("A board", "Another board") == same
    assert fingerprint("memory_gib = 2.0", "memory_gib = 4.0") == same
    assert fingerprint("l2 = 524288", "l2 = 262144") != same
    assert fingerprint("registers = 32", "registers = 16") != same
    assert fingerprint("aarch64-linux-gnu", "aarch64-linux-android") != same


@pytest.mark.parametrize(
    ("flags", "cpu", "log", "floats", "registers", "mcpu"),
    [
        ("fma avx2 avx512f avx512bw", "znver4", "host-x86-64-avx512", 16, 32, "znver4"),
        ("fma avx2", "znver3", "host-x86-64-avx2", 8, 16, "znver3"),
        ("fma avx2", "znver4", "host-x86-64-avx2", 8, 16, "haswell"),  # AVX-512 hidden by a hypervisor
        ("sse4_2", "nehalem", "host-x86-64-sse", 4, 16, "x86-64-v2"),
    ],
)
def test_the_host_is_what_its_processor_offers(monkeypatch, tmp_path, flags, cpu, log, floats, registers, mcpu):
    (tmp_path / "cpuinfo").write_text(f"model name\t: Some CPU\nflags\t\t: {flags}\ncpu MHz\t\t: 2500.1\n")
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(host, "CPUS", tmp_path)
    monkeypatch.setattr(host, "_llvm_cpu", lambda: cpu)
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    target = load_target("host")
    assert target.tuning_log == log
    assert (target.vector.floats, target.vector.registers) == (floats, registers)
    assert target.tvm["mcpu"] == mcpu
    assert target.clusters[0].max_ghz == 2.5
    assert target.caches.l1d == 32768  # what stands in where the kernel tells nothing


def test_clusters_of_an_arm_host_are_told_apart_by_their_clocks(monkeypatch, tmp_path):
    for cpu, khz in enumerate([1800000, 1800000, 2400000]):
        folder = tmp_path / f"cpu{cpu}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "cpuinfo_max_freq").write_text(str(khz))
    monkeypatch.setattr(host, "CPUS", tmp_path)
    monkeypatch.setattr(host, "_llvm_cpu", lambda: "cortex-a76")
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _pid: {0, 1, 2})
    target = load_target("host")
    assert [(cluster.max_ghz, cluster.cores) for cluster in target.clusters] == [(2.4, 1), (1.8, 2)]
    assert target.link.machine == "aarch64"


def test_a_quota_of_the_control_group_limits_the_cores(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    assert host.available_cores() == 1


def test_another_architecture_is_told(monkeypatch):
    monkeypatch.setattr(host.platform, "machine", lambda: "riscv64")
    with pytest.raises(DanceError, match="riscv64"):
        load_target("host")


def test_a_gpu_that_is_not_here_is_told(monkeypatch):
    from dance_tvm.machines import gpu

    monkeypatch.setattr(gpu, "detect_cuda", lambda: None)
    assert load_target("cuda").description.endswith("this machine has none")
    monkeypatch.setattr(gpu, "detect_cuda", lambda: {"description": "NVIDIA L4"})
    assert load_target("cuda").description == "NVIDIA L4"


def test_only_code_in_half_precision_may_use_what_is_there_for_it():
    target = load_target("snapdragon").model_copy(update={"half_features": ["of_halves"]})
    assert target.storing("float32") is target
    half = target.storing("float16")
    assert half.tvm["mattr"] == [*target.tvm["mattr"], "+of_halves"]
    assert half.name == target.name
