"""An artifact packed for others: a C folder with CMake, an Android library module, a wheel that needs only numpy."""

from __future__ import annotations

import base64
import hashlib
import keyword
import re
import shutil
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from dance_tvm.artifact.c_interface import HEADER, INTERFACE
from dance_tvm.artifact.folder import ARCHIVE, LIBRARY, WEIGHTS, Artifact
from dance_tvm.core.errors import DanceError

Format = Literal["c", "android", "wheel"]

#: A version by PEP 440, without epochs.
_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+(\.[a-z0-9]+)*)?")
#: Names that pip knows machines by: wheels for glibc 2.17 or newer.
_PLATFORM = "manylinux2014_{machine}"
_MODULE = """{about!r}

from pathlib import Path

from .dance_model import Model, ModelError

__all__ = ["Model", "ModelError", "load"]


def load(threads=None, **options):
    \"\"\"A model ready to run: ``load().run({{name: array}})``.\"\"\"
    return Model(Path(__file__).parent, threads, **options)
"""

#: An app may open a phone's OpenCL only where its manifest says so (Android 12 and newer).
_ANDROID_MANIFEST = """<manifest xmlns:android="http://schemas.android.com/apk/res/android">
  <application>
    <uses-native-library android:name="libOpenCL.so" android:required="false" />
  </application>
</manifest>
"""


def pack(artifact: Artifact, out: Path, form: Format, version: str = "1.0.0") -> Path:
    """Write the verified ``artifact`` to ``out`` in the given form; gives the folder or file written.

    Raises DanceError where the artifact does not fit the form, or ``out`` exists or cannot be written.
    """
    try:
        return _packed(artifact, out, form, version)
    except OSError as error:
        raise DanceError(f"{out} cannot be written ({error.strerror or error}): choose another --out") from None


def _packed(artifact: Artifact, out: Path, form: Format, version: str) -> Path:
    forms: dict[str, Callable[[Artifact, Path], None]] = {"c": _c, "android": _android}
    if form == "wheel":
        return _wheel(artifact, out, version)
    if out.exists():
        raise DanceError(f"{out} is there already: choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        forms[form](artifact, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _copy(folder: Path, *sources: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copy2(source, folder)


def _files(artifact: Artifact) -> list[Path]:
    return [artifact.library, *([artifact.path / WEIGHTS] if artifact.manifest.parameters else [])]


def _c(artifact: Artifact, out: Path) -> None:
    static = [artifact.path / ARCHIVE] if ARCHIVE in artifact.manifest.files else []
    _copy(out, *_files(artifact), *static, INTERFACE / "CMakeLists.txt")
    _copy(out / "include", HEADER)


def _android(artifact: Artifact, out: Path) -> None:
    target = artifact.manifest.target
    if not target.is_android:
        raise DanceError(f"{artifact.path} is built for {target.name}: an Android app needs --target snapdragon")
    sources = INTERFACE / "android"
    main = out / "src/main"
    _copy(out, sources / "build.gradle.kts")
    _copy(main / "cpp", sources / "CMakeLists.txt", sources / "dance_jni.c")
    _copy(main / "cpp/include", HEADER)
    _copy(main / "java/org/dance", sources / "DanceModel.java")
    _copy(main / "jniLibs/arm64-v8a", artifact.library)
    (main / "jniLibs/arm64-v8a" / LIBRARY).rename(main / "jniLibs/arm64-v8a/libdance_network.so")
    (main / "AndroidManifest.xml").write_text(_ANDROID_MANIFEST)
    if artifact.manifest.parameters:
        _copy(main / "assets", artifact.path / WEIGHTS)


def _wheel(artifact: Artifact, out: Path, version: str) -> Path:
    if not _VERSION.fullmatch(version):
        raise DanceError(f"--version {version} is not a version for a wheel: give one like 1.2.0 or 1.2.0rc1")
    if artifact.manifest.target.is_android:
        raise DanceError(f"{artifact.path} is built for Android, which takes no wheel: give --format android or c")
    name = _module_name(artifact.manifest.name)
    tag = f"py3-none-{_PLATFORM.format(machine=artifact.manifest.target.machine)}"
    info = f"{name}-{version}.dist-info"
    texts = {
        f"{name}/__init__.py": _MODULE.format(about=f"The network {artifact.manifest.name}, compiled by dance_tvm."),
        f"{name}/dance_model.py": (INTERFACE / "dance_model.py").read_text(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: numpy\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: dance_tvm\nRoot-Is-Purelib: false\nTag: {tag}\n",
    }
    files = {place: text.encode() for place, text in texts.items()}
    files.update({f"{name}/{path.name}": path.read_bytes() for path in _files(artifact)})
    path = out / f"{name}-{version}-{tag}.whl"
    if path.exists():
        raise DanceError(f"{path} is there already: choose another --out or --version")
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    record = [f"{place},sha256={_digest(data)},{len(data)}" for place, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    partial = path.with_suffix(".partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for place, data in files.items():
                archive.writestr(zipfile.ZipInfo(place, (2020, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
        if is_new and not path.exists():
            out.rmdir()
    return path


def _module_name(network: str) -> str:
    """What Python imports a network by, and pip knows it by: ASCII, without accents, and not another module's name."""
    plain = unicodedata.normalize("NFKD", network).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")
    taken = {"numpy", "dance_tvm", *keyword.kwlist, *sys.stdlib_module_names}
    return name if name.isidentifier() and name not in taken else f"network_{name}".rstrip("_")


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
