"""Artifacts as others build with them: the C folder with CMake, the wheel with numpy alone, the Android module."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.utils import canonicalize_name, parse_wheel_filename
from torch import nn
from typer.testing import CliRunner

from dance_tvm import DanceError, Options, build_network, pack
from dance_tvm.artifact import pack_formats
from dance_tvm.artifact.c_interface import INTERFACE
from dance_tvm.artifact.folder import load_artifact
from dance_tvm.artifact.pack_formats import _module_name

USE_C = """
#include <dance_model.h>
int main(void) {
  char error[512];
  const dance_api *api = dance_model_open(DANCE_MODEL_LIBRARY, error, sizeof error);
  if (!api) return puts(error), 1;
  dance_options options = {.size = sizeof options};
  dance_model *model = api->create(&options, error, sizeof error);
  if (!model) return puts(error), 1;
  float x[4] = {1, 2, 3, 4}, y[2];
  const void *inputs[] = {x};
  void *outputs[] = {y};
  if (api->run(model, inputs, outputs)) return puts(api->error(model)), 1;
  printf("%.6f %.6f\\n", y[0], y[1]);
  api->destroy(model);
  return 0;
}
"""

USE_LINKED = """
#include <cstdio>
#include <dance_model.h>
int main() {
  dance_options options = {};
  options.size = sizeof options;
  dance::Model model(dance_model_api(DANCE_VERSION), options);
  float x[4] = {1, 2, 3, 4}, y[2];
  model.run({x}, {y});
  std::printf("%.6f %.6f\\n", y[0], y[1]);
}
"""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval()


def artifact(network: nn.Module, out: Path, target: str = "host") -> Path:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    options = Options(static=target == "host")
    return build_network(network, out, target=target, example_inputs=(x,), check=False, options=options).artifact.path


@pytest.fixture(scope="module")
def host(network, tmp_path_factory) -> Path:
    return artifact(network, tmp_path_factory.mktemp("pack") / "small")


def packed(*words: object) -> str:
    done = CliRunner().invoke(pack.app, [*map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)["written"]


def expected(network: nn.Module) -> np.ndarray:
    return network(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).detach().numpy()[0]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_c_folder_is_built_with_cmake(host, network, tmp_path):
    folder = packed(host, "--out", tmp_path / "dance")
    (tmp_path / "main.c").write_text(USE_C)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(app LANGUAGES C CXX)\nadd_subdirectory(dance)\n"
        "add_executable(app main.c)\ntarget_link_libraries(app PRIVATE dance_model)\n"
        "add_executable(linked linked.cpp)\ntarget_link_libraries(linked PRIVATE dance_model_static)\n"
    )
    (tmp_path / "linked.cpp").write_text(USE_LINKED)
    for step in (["cmake", "-S", tmp_path, "-B", tmp_path / "build"], ["cmake", "--build", tmp_path / "build"]):
        done = subprocess.run(step, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for program in ("app", "linked"):
        shown = subprocess.run([tmp_path / "build" / program], capture_output=True, text=True).stdout
        np.testing.assert_allclose([float(word) for word in shown.split()], expected(network), atol=1e-5)
    assert Path(folder).is_dir()


def test_a_wheel_runs_where_neither_tvm_nor_torch_is(host, network, tmp_path):
    wheel = packed(host, "--format", "wheel", "--out", tmp_path)
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
    )
    folder = Path(site.stdout.strip())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel]
    assert subprocess.run(install).returncode == 0
    for each in Path(np.__file__).parent.parent.glob("numpy*"):
        os.symlink(each, folder / each.name)
    code = (
        "import sys, numpy, sequential\nmodel = sequential.load(threads=1)\n"
        "x = numpy.array([[1, 2, 3, 4]], 'float32')\n(y,) = model.run({next(iter(model.inputs)): x}).values()\n"
        "assert not {'tvm', 'torch'} & set(sys.modules)\nprint(*y[0])"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose([float(word) for word in done.stdout.split()], expected(network), atol=1e-5)


@pytest.mark.parametrize(
    ("network", "module"),
    [
        ("Café-Net v2", "cafe_net_v2"),
        ("сеть", "network"),
        ("3d", "network_3d"),
        ("numpy", "network_numpy"),
        ("json", "network_json"),
        ("class", "network_class"),
        ("._", "network"),
    ],
)
def test_a_wheel_has_a_name_that_pip_and_python_take(network, module):
    assert _module_name(network) == module
    assert canonicalize_name(module, validate=True) == module.replace("_", "-")


def test_a_wheel_of_an_artifact_with_a_name_in_any_script_installs(network, tmp_path):
    out = tmp_path / "small"
    shutil.copytree(artifact(network, tmp_path / "made"), out)
    loaded = load_artifact(out)
    named = replace(loaded, manifest=loaded.manifest.model_copy(update={"name": 'сеть """\\'}))
    wheel = pack_formats.pack(named, tmp_path / "dist", "wheel")
    assert parse_wheel_filename(wheel.name)[0] == "network"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    assert subprocess.run(install).returncode == 0
    code = "import network; assert 'сеть' in network.__doc__; network.load(threads=1)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site").returncode == 0


def test_an_android_module_compiles(network, tmp_path):
    """Java by javac, JNI by clang for aarch64, where a JDK is at hand."""
    phone = artifact(network, tmp_path / "phone", "snapdragon")
    main = Path(packed(phone, "--format", "android", "--out", tmp_path / "module")) / "src/main"
    assert (main / "jniLibs/arm64-v8a/libdance_network.so").read_bytes() == (phone / "model.so").read_bytes()
    android = load_artifact(phone)
    with pytest.raises(DanceError, match="is built for Android, which takes no wheel"):
        pack_formats.pack(android, tmp_path / "wheel", "wheel")
    board = {"tvm": {"mtriple": "aarch64-linux-gnu"}, "name": "aarch64-linux"}
    board = android.manifest.target.model_copy(update=board)
    linux = replace(android, manifest=android.manifest.model_copy(update={"target": board}))
    with pytest.raises(DanceError, match="is built for aarch64-linux: an Android app needs --target snapdragon"):
        pack_formats.pack(linux, tmp_path / "app", "android")
    javac = shutil.which("javac")
    if javac is None:
        pytest.skip("needs a JDK")
    classes = tmp_path / "classes"
    java = [javac, "-h", tmp_path / "headers", "-d", classes, main / "java/org/dance/DanceModel.java"]
    done = subprocess.run(java, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jdk = Path(javac).resolve().parent.parent / "include"
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17", "-Wall", "-Wextra", "-Werror"]
    flags = [f"-I{each}" for each in (main / "cpp/include", jdk, jdk / "linux", tmp_path / "headers")]
    check = ["-include", "org_dance_DanceModel.h"]  # what javac says the functions are called and take
    output = tmp_path / "dance_jni.o"
    done = subprocess.run(
        [*zig, *flags, *check, "-c", main / "cpp/dance_jni.c", "-o", output], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime")
def test_java_runs_an_artifact(host, network, tmp_path):
    """The JNI code on this machine's Java, with this machine's artifact."""
    javac, compiler = shutil.which("javac"), shutil.which("cc")
    if javac is None or compiler is None:
        pytest.skip("needs a JDK and a C compiler")
    jdk = Path(javac).resolve().parent.parent / "include"
    android = INTERFACE / "android"
    flags = [f"-I{each}" for each in (INTERFACE, jdk, jdk / "linux")]
    library = ["-shared", "-fPIC", *flags, android / "dance_jni.c", "-o", tmp_path / "libdance_jni.so"]
    assert subprocess.run([compiler, *library]).returncode == 0
    (tmp_path / "Use.java").write_text(
        "import java.nio.ByteBuffer;\npublic class Use { public static void main(String[] path) {\n"
        "  try (org.dance.DanceModel model = new org.dance.DanceModel(path[0], 1)) {\n"
        "    ByteBuffer[] in = model.inputs(), out = model.outputs();\n"
        "    for (int each = 0; each < 4; each++) in[0].putFloat(4 * each, each + 1);\n"
        "    model.run(in, out);\n"
        '    System.out.println(out[0].getFloat(0) + " " + out[0].getFloat(4));\n'
        "    try { model.run(in, in); }\n"
        "    catch (IllegalStateException error) { System.out.println(error.getMessage()); }\n"
        "  } } }\n"
    )
    sources = [tmp_path / "Use.java", android / "DanceModel.java"]
    assert subprocess.run([javac, "-d", tmp_path / "classes", *sources]).returncode == 0
    java = ["java", f"-Djava.library.path={tmp_path}", "-cp", tmp_path / "classes", "Use", host / "model.so"]
    done = subprocess.run(java, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    np.testing.assert_allclose([float(word) for word in first.split()], expected(network), atol=1e-5)
    assert others == []  # an input's buffer is larger than the output: it may serve as one


def test_what_is_to_be_done_with_it_is_told(host, tmp_path):
    told = CliRunner().invoke(pack.app, [str(host), "--out", str(tmp_path / "c")]).stdout.splitlines()
    assert told[0] == str(tmp_path / "c")
    assert told[1].startswith(f"next: in your CMakeLists.txt, add_subdirectory({(tmp_path / 'c').absolute()})")
    assert all(form.format(written="out", module="net") for form in pack._NEXT.values())


def test_what_cannot_be_packed_is_refused_in_a_sentence(host, network, tmp_path):
    runner = CliRunner()

    def refusal(*words: object) -> str:
        error = runner.invoke(pack.app, list(map(str, words))).exception
        assert isinstance(error, DanceError)
        return str(error)

    assert "--target snapdragon" in refusal(host, "--format", "android", "--out", tmp_path / "b")
    (tmp_path / "c").mkdir()
    assert "is there already" in refusal(host, "--out", tmp_path / "c")
    (tmp_path / "file").touch()
    for form in ("c", "wheel"):
        assert "cannot be written" in refusal(host, "--format", form, "--out", tmp_path / "file" / "x")
    assert "not a version for a wheel" in refusal(
        host, "--format", "wheel", "--version", "x.y", "--out", tmp_path / "d"
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))  # EFBIG, as on a quota
    try:
        for form in ("c", "wheel"):
            assert "cannot be written" in refusal(host, "--format", form, "--out", tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c", "file"]
