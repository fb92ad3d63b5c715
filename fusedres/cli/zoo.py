"""Models of other libraries, named LIBRARY:NAME."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from fusedres.cli.common import UserError


def _from_torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise UserError(f"torchvision has no model named {name!r}")
    options["weights"] = None
    if name in models.list_models(models.segmentation) + models.list_models(models.detection):
        options["weights_backbone"] = None
    return models.get_model(name, **options)


def _from_timm(name: str, **options: Any) -> nn.Module:
    import timm

    if name not in timm.list_models():
        raise UserError(f"timm has no model named {name!r}")
    return timm.create_model(name, pretrained=False, **options)


LIBRARIES: dict[str, Callable[..., nn.Module]] = {"torchvision": _from_torchvision, "timm": _from_timm}


def build(name: str, **options: Any) -> nn.Module:
    """The model LIBRARY:NAME with random weights, made with that library's ``options``.

    UserError where there is none or the library is missing.
    """
    library, colon, model = name.partition(":")
    if not colon or library not in LIBRARIES:
        raise UserError(f"{name!r} is not {' or '.join(f'{library}:NAME' for library in LIBRARIES)}")
    try:
        importlib.import_module(library)
    except ImportError:
        raise UserError(f"{library} is not installed") from None
    return LIBRARIES[library](model, **options)
