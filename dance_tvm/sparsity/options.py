"""The methods of training and the options of each: known, and checked, without loading PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dance_tvm.core.errors import DanceError
from dance_tvm.core.faults import place_of, said_of
from dance_tvm.models.registry import entry

#: PACKAGE:CLASS of each method: the class stands in PACKAGE.method, its options as CLASSOptions in PACKAGE.options.
METHODS = {
    "dense": "dance_tvm.sparsity:Method",
    "ava": "dance_tvm.sparsity.dance:AVA",
    "aap": "dance_tvm.sparsity.dance:AAP",
    "kgs": "dance_tvm.sparsity.rt3d:KGS",
    "dstep": "dance_tvm.sparsity.dstep:DSTEP",
}


class MethodOptions(BaseModel):
    """A method's own settings; ordinary training has none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def require_epochs(self, epochs: int) -> None:
        """Raise DanceError where the method cannot do with so few epochs."""


Form = TypeVar("Form", bound=MethodOptions)


def method_class(name: str) -> Any:
    """The class of the method called ``name``. Raises DanceError for an unknown name or a package that is missing."""
    return _loaded(name, "method", "")


def method_options(name: str, options: Mapping[str, Any]) -> MethodOptions:
    """All options of the method called ``name``, where ``options`` differ from the defaults. Raises as above, and
    DanceError for a wrong option."""
    form: type[MethodOptions] = _loaded(name, "options", "Options")
    return checked(name, form, options)


def checked(name: str, form: type[Form], options: Mapping[str, Any]) -> Form:
    """``options`` as the method ``name`` takes them. Raises DanceError for a wrong one."""
    try:
        return form(**options)
    except ValidationError as error:
        first = error.errors()[0]
        place = place_of(first, "options")
        said = said_of(first)
        if first["type"] == "extra_forbidden":
            said = f"there is no such option; its options: {', '.join(form.model_fields) or 'none'}"
        raise DanceError(f"--method {name}: {place}: {said}") from error


def require_model(method: str, model: str) -> None:
    """Raise DanceError for a network that the zoo has not, or that the method cannot thin."""
    if method == "dstep" and not entry(model).factory.startswith("dance_tvm.models.resnet:"):
        raise DanceError(not_residual(model))
    entry(model)


def not_residual(model: str) -> str:
    """What is said where D-STEP is to thin another network than it can."""
    return (
        f"--method dstep thins residual networks, and {model} is none; choose --model resnet-mini, resnet18-tsn or "
        "another resnet"
    )


def _loaded(name: str, module: str, ending: str) -> Any:
    if name not in METHODS:
        raise DanceError(f"there is no method called {name!r}; choose one of {', '.join(METHODS)}")
    package, _, found = METHODS[name].partition(":")
    try:
        return getattr(importlib.import_module(f"{package}.{module}"), found + ending)
    except ModuleNotFoundError as error:
        raise DanceError(f"--method {name} needs the module {error.name}, which is not installed") from error
