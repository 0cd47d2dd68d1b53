"""Files of networks and of weights, looked at without PyTorch: what is none is refused at once.

What they hold is read by :mod:`dance_tvm.frontend` and :mod:`dance_tvm.sparsity.checkpoint`.
"""

from __future__ import annotations

import re
import zipfile
from importlib.util import find_spec
from pathlib import Path

from dance_tvm.core.errors import DanceError
from dance_tvm.models.network_inputs import declared_inputs
from dance_tvm.models.registry import require_source

#: How the pickles and archives begin in which PyTorch saves tensors.
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

#: Packages whose networks `dance-tvm export` takes by name.
HUBS = ("torchvision", "pytorchvideo")


def weights_file(weights: str, place: str) -> Path | None:
    """The file that ``--weights`` names; None where it is the name of weights, which torchvision's have dots in."""
    path = Path(weights)
    is_name = not path.suffix or (place == "torchvision" and path.suffix.isupper() and not path.exists())
    return None if is_name else path


def require_python(place: str, name: str) -> None:
    """Raise DanceError where ``place`` cannot be a module of Python whose ``name`` gives a network."""
    if "/" in place or place.endswith(".py"):
        module = Path(place)
        raise DanceError(
            f"{place}:{name} names a file: give {module.stem}:{name}, in the folder {module.parent.absolute()}"
        )
    top = place.partition(".")[0]
    here = Path.cwd() / top
    if not (here.is_dir() or here.with_suffix(".py").is_file() or (top.isidentifier() and find_spec(top))):
        raise DanceError(
            f"{place}:{name} gives no network: there is no module {top} in this folder, and none is installed"
        )


def require_file(path: Path, what: str) -> None:
    """Raise DanceError where ``path`` cannot be read as a file."""
    if path.is_dir():
        raise DanceError(f"{path} is a folder, not a {what} file")
    if not path.is_file():
        raise DanceError(f"there is no {what} file {path}")


def require_network(model: str, weights: Path | None = None) -> None:
    """Raise DanceError unless ``model`` is a name of the zoo or a file that holds a network, as far as can be told
    without reading it whole, and ``weights``, where given, are weights that it takes."""
    require_source(model)
    path = Path(model)
    if path.suffix == ".pt2":
        require_intact(path)
    if path.suffix == ".onnx":
        require_onnx(path, has_weights=weights is not None)
    if weights is not None:
        require_weights(weights)


def require_onnx(path: Path, has_weights: bool = False) -> None:
    """Raise DanceError where an ONNX file cannot be read, or not together with other weights."""
    if find_spec("onnx") is None:
        raise DanceError("reading ONNX files needs the onnx package: pip install 'dance-tvm[onnx]'")
    if has_weights:
        raise DanceError("an ONNX file carries its weights: leave --weights out, or export the network again")
    require_file(path, "model")
    declared_inputs(path)


def require_intact(path: Path) -> None:
    """Raise DanceError where a ``.pt2`` file is torn or holds no exported program."""
    try:
        with zipfile.ZipFile(path) as archive:
            torn, members = archive.testzip(), archive.namelist()
    except (zipfile.BadZipFile, EOFError, OSError):
        raise DanceError(f"{path} is not a .pt2 file, or is truncated: export the network again") from None
    except (ValueError, NotImplementedError, RuntimeError):
        raise DanceError(f"{path} holds a description that cannot be read: export the network again") from None
    if torn is not None:
        raise DanceError(f"{path} is damaged: {torn} inside of it fails its checksum")
    if not any(re.search(r"(^|/)models/[^/]+\.json$", name) for name in members):
        raise DanceError(f"{path} holds no exported program: write it with torch.export.save")


def require_weights(path: Path) -> None:
    """Raise DanceError unless ``path`` is a ``.safetensors`` file or looks like a state dict of PyTorch's."""
    require_file(path, "weights")
    if not (_is_safetensors(path) if path.suffix == ".safetensors" else is_pickled(path)):
        raise not_weights(path)


def not_weights(path: Path) -> DanceError:
    """What is said of a file that holds no weights."""
    return DanceError(f"{path} is not a weights file, or is truncated: give safetensors or a state dict")


def is_pickled(path: Path) -> bool:
    """Whether the file begins as those that PyTorch saves tensors in."""
    with path.open("rb") as opened:
        return opened.read(2) in _PICKLES


def _is_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return True
    except (SafetensorError, OSError):
        return False
