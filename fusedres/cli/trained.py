"""Trained networks: from a checkpoint, published weights or an artefact to a model, its input and its labels."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import fusedres
from fusedres import artefact
from fusedres.card import FOLDED, Card, attached
from fusedres.cli import common, networks
from fusedres.cli.common import UserError
from fusedres.cli.preprocessing import Preprocessing
from fusedres.resnet import VARIANTS
from fusedres.weights import misfit, read_file, resolve

T = TypeVar("T")

DEFAULT_ARCH = "resnet50"
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Trained:
    """A network in eval with trained weights, and what its input and its output mean."""

    arch: str
    model: Any  # a StagedNet
    preprocessing: Preprocessing
    labels: list[str]
    source: str
    folded: bool

    def on(self, device: torch.device) -> Trained:
        """The same on ``device``, its weights final."""
        return dataclasses.replace(self, model=fusedres.freeze(networks.place(self.model, device)))

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) float32 -> (N, classes) on the model's device; UserError where a logit is no number."""
        y = self.model(x.to(self.model.fc.weight.device, memory_format=torch.channels_last))
        if not y.isfinite().all():
            raise UserError(f"{self.source} holds weights whose answer is not finite")
        return y


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which trained network, where and how it runs, and where its results go."""
    parser.add_argument("--arch", help=f"network (default: what the weights say, else {DEFAULT_ARCH})")
    parser.add_argument(
        "--weights",
        help="a checkpoint (.pth, .pt, .safetensors), what `fusedres convert` wrote, or torchvision's published"
        " weights, such as IMAGENET1K_V2",
    )
    parser.add_argument("--image-size", type=common.positive, help="side of the input (default: what the weights say)")
    parser.add_argument("--batch", type=common.positive, default=32, help="pictures at once (default: %(default)s)")
    common.add_run_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")


def load(name: str | None, arch: str | None, image_size: int | None = None) -> Trained:
    """The network ``arch`` with the weights ``name``; UserError where something is missing or does not fit."""
    if name is None:
        raise UserError("a network without trained weights only guesses: name them with --weights")
    _need_torchvision()
    card = _card(Path(name))
    if card is not None and arch not in (None, card.arch):
        raise UserError(f"{name} holds the network {card.arch}, not {arch}")
    arch = arch or (card.arch if card else DEFAULT_ARCH)
    networks.check(arch)
    member = _published(arch, name)
    tensors = _read(name, arch)
    folded = card is not None and card.kind == FOLDED
    model = _model(arch, tensors, folded, name)
    return Trained(
        arch,
        model,
        _preprocessing(arch, card, member, name).sized(image_size),
        _labels(networks.classes_of(model)),
        name,
        folded,
    )


def _need_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except ImportError:
        raise UserError("pictures and their labels need torchvision: pip install 'fusedres[deploy]'") from None


def _card(path: Path) -> Card | None:
    """What the file of weights says of itself; None where it does not, or is no file."""
    if not path.is_file():
        return None
    if path.suffix.lower() == ".safetensors":
        return _told(str(path), lambda: artefact.read_card(path))
    return _told(str(path), lambda: attached(read_file(path), path))


def _read(name: str, arch: str) -> Mapping[str, Tensor]:
    def read() -> Mapping[str, Tensor]:
        checkpoint = resolve(name, _enum_name(arch))
        assert checkpoint is not None  # for there is a name
        return checkpoint.read(True)

    return _told(name, read)


def _told(name: str, read: Callable[[], T]) -> T:
    """What ``read()`` returns; UserError in one line for whatever goes wrong with the weights ``name``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused in any case
            return read()
    except FileNotFoundError:
        raise UserError(f"cannot read {name}: No such file or directory") from None
    except OSError as error:  # also of a download
        raise UserError(f"cannot read {name}: {error.strerror or error}") from None
    except ImportError:
        raise UserError(f"{name} needs safetensors: pip install 'fusedres[deploy]'") from None
    except Exception as error:  # a damaged file fails in zip, pickle or tensor code alike
        lines = str(error).splitlines()
        if isinstance(error, ValueError) and len(lines) == 1:  # this package's own
            raise UserError(lines[0] if name in lines[0] else f"{name}: {lines[0]}") from None
        reason = f"{type(error).__name__}: {lines[0][:100]}" if lines else type(error).__name__
        raise UserError(f"{name} is no readable checkpoint ({reason})") from None


def _model(arch: str, tensors: Mapping[str, Tensor], is_folded: bool, name: str) -> Any:
    model: Any = networks.build(arch, num_classes=_count_classes(tensors))
    model = artefact.hollow(model) if is_folded else model.eval().requires_grad_(False)
    expected = artefact.state(model) if is_folded else model.state_dict()
    fault = misfit(expected, tensors)
    if fault is not None:
        raise UserError(f"{name} does not fit {arch}: {fault}")
    _told(name, lambda: model.load_state_dict(tensors, strict=False))
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{name} holds numbers that are not finite")
    return model


def _count_classes(tensors: Mapping[str, Tensor]) -> int | None:
    """How many classes a checkpoint was trained for; None where it does not say."""
    bias = tensors.get("fc.bias")
    return None if bias is None or bias.ndim != 1 else len(bias) or None


def _enum_name(arch: str) -> str | None:
    return f"{VARIANTS[arch].enum}_Weights" if arch in VARIANTS else None


def _published(arch: str, name: str) -> Any:
    """The member of torchvision's enum of that name, or whose file is called so; None where there is none."""
    from torchvision import models

    enum_name = _enum_name(arch)
    if enum_name is None:
        return None
    enum = getattr(models, enum_name)
    member = enum.__members__.get(name.removeprefix(f"{enum_name}."))
    return member or next((member for member in enum if member.url.endswith(f"/{Path(name).name}")), None)


def _preprocessing(arch: str, card: Card | None, member: Any, name: str) -> Preprocessing:
    if card is not None:
        return _told(name, lambda: Preprocessing.parse(card.preprocessing))
    if member is not None:
        return Preprocessing.of(member)
    return Preprocessing.standard(networks.default_image_size(arch))


def _labels(classes: int) -> list[str]:
    """ImageNet's names where there are as many classes, else their numbers."""
    if classes != IMAGENET_CLASSES:
        return [str(number) for number in range(classes)]
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.DEFAULT.meta["categories"])
