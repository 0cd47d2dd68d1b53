"""The doctor finds what works and what does not, with the command that mends it."""

from __future__ import annotations

import json
import stat
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from dance_tvm import doctor
from dance_tvm.core.errors import DanceError
from dance_tvm.device import processes
from dance_tvm.device.opencl import OpenCLSession
from dance_tvm.machines import gpu


def test_this_machine_is_well():
    result = CliRunner().invoke(doctor.app, ["--json"])
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert result.exit_code == 0
    for name in ("tvm versions", "tvm save_json", "code generator", "linker", "android ndk"):
        assert findings[name]["state"] == "works", findings[name]
    for finding in findings.values():
        assert (finding["mend"] == "") == (finding["state"] == "works")


def test_a_crashing_tvm_is_told_not_suffered(monkeypatch, tmp_path):
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(crashing.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(crashing))
    finding = doctor.save_json()
    assert (finding.state, finding.seen) == ("broken", "ended by signal 11")
    assert finding.mend == "pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1"


def test_wrong_versions_missing_linker_and_ndk(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.15.post2")
    assert doctor.versions().state == "broken"
    monkeypatch.setattr("dance_tvm.artifact.linker.importlib.util.find_spec", lambda name: None)
    assert doctor.linker().mend == "pip install ziglang"
    monkeypatch.setenv("TVM_NDK_CC", "/nowhere/clang")
    assert doctor.ndk().mend == "unset TVM_NDK_CC"


def test_without_qemu_the_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finding = doctor.emulator()
    assert finding.state == "missing"
    assert "qemu-user and mmdebstrap missing" in finding.seen
    assert "apt-get install" in finding.mend


def test_a_processor_that_pocl_does_not_know_is_no_device(monkeypatch):
    unknown = SimpleNamespace(version="OpenCL 3.0 PoCL HSTR: pthread-x86_64-unknown-linux-gnu-generic", name="new")
    known = SimpleNamespace(version="OpenCL 3.0 PoCL HSTR: pthread-aarch64-unknown-linux-gnu-generic", name="arm")
    monkeypatch.setattr(gpu, "_all_opencl_devices", lambda: [unknown, known])
    assert gpu.opencl_devices() == [known]
    monkeypatch.setattr(gpu, "_all_opencl_devices", lambda: [unknown])
    with pytest.raises(DanceError, match=r"older than this processor: sudo apt-get install pocl-opencl-icd$"):
        OpenCLSession()
    problem = "there is no OpenCL device here: PoCL's wheel is older than this processor: sudo apt-get install it"
    for said, mend in ((problem, "sudo apt-get install it"), ("ended by signal 11", doctor.GPU), ("", "")):
        monkeypatch.setattr(doctor, "_probe", lambda _code, said=said: said)
        finding = doctor.opencl()
        assert (finding.state, finding.mend) == ("missing" if said else "works", mend)
        assert finding.seen.startswith(said.removesuffix(f": {mend}"))


def test_tracker_is_asked():
    process, port = processes.start_tracker()
    try:
        assert doctor.tracker_answers(f"127.0.0.1:{port}").seen.endswith("has no devices")
    finally:
        process.stop()
    finding = doctor.tracker_answers(f"127.0.0.1:{port}")
    assert finding.state == "broken"
    assert finding.mend == f"python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port {port}"


def test_something_broken_is_exit_code_1(monkeypatch):
    broken = doctor.Finding("x", "broken", "seen", "mend it")
    monkeypatch.setattr(doctor, "examine", lambda tracker, on_look: [broken])
    result = CliRunner().invoke(doctor.app, [])
    assert result.exit_code == 1
    assert "mend it" in result.stdout
    with pytest.raises(doctor.DanceError, match="HOST:PORT"):
        doctor.tracker_answers("nonsense")
