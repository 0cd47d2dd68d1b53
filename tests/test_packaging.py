"""The folders at the top of the repository are reached from the package, however it was installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPPED = (
    ".git",
    ".venv",
    ".*_cache",
    "__pycache__",
    "build",
    "dist",
    "artifacts",
    "runs",
    "*.egg-info",
    "site",
    ".hypothesis",
)

# Prints where the package came from, after having used each of the three folders.
USE = """
from pathlib import Path
import dance_tvm, dance_tvm.schedules
from dance_tvm.machines.target import load_target
assert load_target("snapdragon").clusters[0].mcpu == "cortex-x2"
package = Path(dance_tvm.__file__).parent
for folder in ("schedules", "targets", "tuning_logs"):
    names = sorted(path.name for path in (package / folder).iterdir() if not path.name.startswith(("_", ".")))
    print(folder, *names, sep=",")
print(package.resolve())
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, so that building leaves nothing in the real one."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*SKIPPED))


@pytest.fixture(scope="module")
def wheel(checkout):
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", checkout.parent, checkout)
    return next(checkout.parent.glob("*.whl"))


@pytest.fixture(scope="module")
def with_wheel(wheel):
    return environment(wheel.parent / "with-wheel", str(wheel))


def environment(folder, *install):
    """A new virtual environment that holds dance_tvm alone and finds everything else where this one does."""
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    paths = {
        name: call(python, "-c", f"import sysconfig; print(sysconfig.get_path('{name}'))").strip()
        for name in ["purelib"]
    }
    Path(paths["purelib"], "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall"]
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, *install)
    return python


def call(*command, cwd=None):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=cwd, env=clean)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def used(python, cwd):
    """What each folder held, and the folder of the package, as seen by ``python`` started in ``cwd``."""
    *folders, package = call(python, "-c", USE, cwd=cwd).splitlines()
    return {line.split(",")[0]: line.split(",")[1:] for line in folders}, Path(package)


def expected():
    folders = ("schedules", "targets", "tuning_logs")
    return {
        folder: sorted(path.name for path in (ROOT / folder).iterdir() if not path.name.startswith(("_", ".")))
        for folder in folders
    }


def test_editable_install(checkout, tmp_path):
    found, package = used(environment(checkout.parent / "editable", "--editable", checkout), tmp_path)
    assert found == expected()
    assert package == checkout / "dance_tvm"


def test_wheel_used_from_another_folder(with_wheel, tmp_path):
    found, package = used(with_wheel, tmp_path)
    assert found == expected()
    assert package.is_relative_to(with_wheel.parent.parent)


def test_wheel_used_from_inside_the_checkout(with_wheel, checkout):
    # `python -m` and `python -c` put the folder they are started in first: there the checkout's own package is used,
    found, package = used(with_wheel, checkout)
    assert found == expected()
    assert package == checkout / "dance_tvm"
    # while the console script uses the installed one. Both reach the folders.
    assert "Cortex-X2" in call(with_wheel.parent / "dance-tvm", "targets", "snapdragon", cwd=checkout)
    assert "Cortex-X2" in call(with_wheel, "-m", "dance_tvm.show_targets", "snapdragon", cwd=checkout)


def test_the_wheel_is_typed_and_holds_nothing_that_is_not_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "dance_tvm/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert all(top == "dance_tvm" or top.endswith(".dist-info") for top in tops), tops
    assert not [name for name in names if name.endswith((".pth", ".mp4", ".so"))]


def test_the_wheel_is_the_same_compiler_as_the_checkout(with_wheel, checkout, tmp_path):
    """Artifacts tell by this hash which compiler made them."""
    code = "from dance_tvm.core.versions import versions; print(versions()['sources'])"
    assert call(with_wheel, "-c", code, cwd=tmp_path) == call(with_wheel, "-c", code, cwd=checkout)


def test_wheel_and_source_distribution_hold_every_data_file(wheel, checkout):
    """A wheel built from the source distribution has the same files as one of the checkout, data among them."""
    call(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", checkout.parent / "sdist", checkout)
    (packed,) = (checkout.parent / "sdist").glob("*.tar.gz")
    shutil.unpack_archive(packed, checkout.parent / "unpacked", filter="data")
    (source,) = (checkout.parent / "unpacked").iterdir()
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", checkout.parent / "again", source)
    (again,) = (checkout.parent / "again").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(zipfile.ZipFile(again).namelist()) == names
    for top in ("dance_tvm", "schedules", "targets", "tuning_logs"):
        for path in (checkout / top).rglob("*"):
            place = path.relative_to(checkout).as_posix()
            place = place if top == "dance_tvm" else f"dance_tvm/{place}"
            if path.is_file() and not path.is_symlink() and "__pycache__" not in place:
                assert place in names, f"{place} is not in the wheel"


def test_the_dockerfile_copies_what_the_package_is_built_from():
    """No daemon builds the image here; what it copies is at least there."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "dance_tvm", "schedules", "targets", "tuning_logs"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
