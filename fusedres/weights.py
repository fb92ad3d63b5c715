"""``weights=``: a member of a torchvision weights enum, its name, or a local checkpoint file."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

#: What ``weights=`` takes; True and False are what torchvision's ``pretrained=`` was.
Weights = Enum | str | os.PathLike | bool | None

SUFFIXES = (".pth", ".pt", ".safetensors")
WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "module.")  # DDP and torch.compile, whichever is the outer one
NAMED = 4  # tensors of a kind that a message names
_FOLDED = (
    "it was folded for inference and has no BN. Run it with `fusedres predict` or `fusedres evaluate`, or load the"
    " checkpoint that `fusedres convert` made it from"
)
LEGACY_MEMBER = "IMAGENET1K_V1"  # what torchvision's pretrained=True stands for


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's tensors come from, and how many classes they were trained for (None: the file does not say)."""

    source: str
    num_classes: int | None
    read: Callable[[bool], Mapping[str, Tensor]]

    def load_into(self, model: nn.Module, progress: bool = True) -> None:
        """Load every tensor, strictly; RuntimeError naming the source and each key that does not fit."""
        tensors = self.read(progress)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            why = _FOLDED if _is_folded(tensors) else str(error)
            raise RuntimeError(f"{self.source} does not fit {type(model).__name__}: {why}") from error


def resolve(weights: Weights, enum_name: str | None) -> Checkpoint | None:
    """What ``weights=`` means for a model whose published weights are ``torchvision.models.<enum_name>``.

    Nothing is read yet. TypeError for a member of another enum, ValueError for an unknown name, ImportError where
    published weights are asked for without torchvision.
    """
    if isinstance(weights, bool) and enum_name is not None:
        weights = _legacy_name(weights, enum_name)
    if weights is None:
        return None
    if isinstance(weights, os.PathLike) or (isinstance(weights, str) and _is_path(weights)):
        path = Path(weights)
        return Checkpoint(str(path), None, lambda progress: read_file(path))
    if enum_name is None:
        raise ValueError(f"this model has no published weights, so weights= takes a file; {weights!r} is none")
    member = _enum_member(weights, enum_name)
    return Checkpoint(
        repr(member),
        len(member.meta["categories"]),
        lambda progress: member.get_state_dict(progress=progress, check_hash=True),
    )


def read_file(path: Path) -> Mapping[str, Tensor]:
    """The state_dict in a ``.safetensors`` file, or in any file of ``torch.save`` (tensors only, no other objects).

    OSError where it cannot be read, ValueError where it holds something else.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            content = _load_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint that torch.load(weights_only=True) accepts: {_refusal(error)}"
        ) from error
    except Exception as error:  # a damaged file fails in zip, pickle or tensor code alike
        reason = f": {str(error).splitlines()[0][:100]}" if str(error) else ""
        raise ValueError(f"{path} is no readable checkpoint ({type(error).__name__}{reason})") from error
    return unwrap(content, path)


def _refusal(error: pickle.UnpicklingError) -> str:
    """In a line, what PyTorch says in many."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for code to be run ({code[1]}), which was not" if code else "it is not one of torch.save"


def unwrap(checkpoint: Any, path: Path) -> Mapping[str, Tensor]:
    """The state_dict inside a training checkpoint: without ``{"state_dict": ...}`` and without ``module.`` prefixes."""
    while wrapper := next((key for key in WRAPPERS if _is_mapping_of(checkpoint, key)), None):
        checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, dict) or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(f"{path} holds no state_dict: expected a dict of tensors, plain or under one of {WRAPPERS}")
    for prefix in PREFIXES:
        consume_prefix_in_state_dict_if_present(checkpoint, prefix)
    return checkpoint


def misfit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Why the tensors ``given`` are not those ``expected``, in one line; None where they are.

    BN's counter of batches may be missing, for files of older versions of PyTorch lack it.
    """
    missing = [name for name in expected if name not in given and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in given if name not in expected]
    reshaped = [
        f"{name} {tuple(given[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    retyped = [
        f"{name} {given[name].dtype}"
        for name, tensor in expected.items()
        if name in given and given[name].is_floating_point() != tensor.is_floating_point()
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped, "of another kind": retyped}
    return "; ".join(f"{fault} {_few(names)}" for fault, names in faults.items() if names) or None


def _few(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _is_folded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a network's convs with BN folded into them."""
    return "conv1.bias" in tensors and not any(name.endswith(".running_var") for name in tensors)


def _legacy_name(pretrained: bool, enum_name: str) -> str | None:
    name = f"{enum_name}.{LEGACY_MEMBER}" if pretrained else None
    warnings.warn(f"pretrained={pretrained} is deprecated; weights={name!r} does the same", stacklevel=4)
    return name


def _is_path(text: str) -> bool:
    return os.path.isfile(text) or text.lower().endswith(SUFFIXES)


def _is_mapping_of(checkpoint: Any, key: str) -> bool:
    return isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping)


def _enum_member(weights: Any, enum_name: str) -> Any:
    try:
        import torchvision.models
    except ImportError as error:
        raise ImportError(f"weights={weights!r} needs torchvision; without it weights= takes a file") from error
    enum = getattr(torchvision.models, enum_name)
    try:
        return enum.verify(weights)
    except KeyError:
        names = ", ".join(enum.__members__)
        raise ValueError(f"weights={weights!r} is neither a file nor a member of {enum_name} ({names})") from None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install 'fusedres[deploy]'") from error
    return load_file(path)
