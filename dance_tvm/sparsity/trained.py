"""What a training run left, read without PyTorch: its card, from the header of its file of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dance_tvm.core.errors import DanceError
from dance_tvm.sparsity.options import method_options
from dance_tvm.sparsity.settings import Settings

#: Where the header of a checkpoint has what is known of the run, as JSON.
HEADER_KEY = "dance_tvm"


def read_card(path: Path) -> dict[str, Any]:
    """What is known of the run that wrote ``path``.

    Raises DanceError when the file is missing, torn, or was not written by this package.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DanceError(
            f"{path} is missing: name a folder that a training run has written to, or train without --resume"
        )
    try:
        with safe_open(path, framework="np") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
        if header is None:
            raise DanceError(f"{path} is not a checkpoint of dance_tvm: its header carries no {HEADER_KEY!r} entry")
        card: dict[str, Any] = json.loads(header)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise DanceError(f"{path} is not a readable checkpoint ({error}); train anew or name another file") from error
    return card


def require_trained(path: Path) -> None:
    """Raise DanceError unless ``path`` holds a network that D-STEP trained."""
    if "dstep" not in read_card(path):
        raise DanceError(f"{path} holds no D-STEP network; name the model.safetensors of a run with --method dstep")


def continued(path: Path, given: Mapping[str, Any]) -> Settings:
    """The settings of the run that left the checkpoint ``path``, with more epochs where ``given`` says so.

    Raises DanceError where another of those ``given`` is not the run's own.
    """
    theirs = read_card(path)["settings"]
    options = {**theirs.get("options", {}), **given.get("options", {})}
    ours = Settings(**{**theirs, **given, "options": options})
    if method_options(ours.method, options) == method_options(theirs["method"], theirs.get("options", {})):
        ours = ours.model_copy(update={"options": theirs.get("options", {})})  # 0.5 is 50%
    require_same_run(path, ours)
    return ours


def require_same_run(path: Path, settings: Settings) -> None:
    """Raise DanceError where the checkpoint ``path`` is of a run with other settings; more epochs prolong it."""
    ours, theirs = settings.fingerprint(), read_card(path)["settings"]
    defaults = Settings.model_fields  # of what a checkpoint says nothing, written before there was a choice
    theirs = {name: theirs.get(name, defaults[name].default) for name in ours}
    if settings.epochs > theirs["epochs"]:
        theirs["epochs"] = settings.epochs
    for name, own in ours.items():
        if own != theirs[name]:
            less = ", and only more than that prolong it" if name == "epochs" else ""
            raise DanceError(
                f"{path} belongs to another run: its {name} is {theirs[name]!r}, not {own!r}{less}; leave it out, or "
                "train into another folder"
            )
