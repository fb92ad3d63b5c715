"""Networks by name, and each one's eager twin: the same modules under the same names, run one by one."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

import fusedres.cifar
import fusedres.plain
import fusedres.resnet  # noqa: F401  (these three fill the registry)
from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.cli.common import UserError
from fusedres.layers import FusedConvBNReLU
from fusedres.models import MODELS


def build(arch: str, memory: str = "standard", num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """The fused network ``arch`` with random weights that depend on ``seed`` alone. UserError for an unknown name."""
    check(arch)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    torch.manual_seed(seed)
    return MODELS[arch](memory=memory, **options)


def check(arch: str) -> None:
    """UserError, with all names, where no network is named ``arch``."""
    if arch not in MODELS:
        raise UserError(f"no network is named {arch!r}; there are {', '.join(MODELS)}")


def depth_of(arch: str) -> int:
    """The number in a network's name: ``cifar_resnet110`` -> 110."""
    return int(re.findall(r"\d+", arch)[0])


def classes_of(model: nn.Module) -> int:
    """The size of a network's logits."""
    return len(model.state_dict()["fc.bias"])


def place(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``model`` on ``device`` in ``dtype`` and channels_last, changed in place."""
    return model.to(device, dtype).to(memory_format=torch.channels_last)


def default_image_size(arch: str) -> int:
    """The side of the pictures a network was made for."""
    return 32 if arch.startswith("cifar") else 224


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of all stages, in order."""
    return [block for name, stage in model.named_children() if name.startswith("layer") for block in stage.children()]


def eager_twin(arch: str, fused: nn.Module) -> tuple[nn.Module, str]:
    """The eager network with the weights of ``fused``, and whose it is.

    torchvision's own where it has one and is installed, so that the comparison is with what users run today; else
    the same modules called one by one.
    """
    if importlib.util.find_spec("torchvision") is not None:
        from torchvision import models

        if arch in models.list_models(module=models):
            twin = models.get_model(arch, num_classes=classes_of(fused))
            twin.load_state_dict(fused.state_dict())
            return twin, "torchvision"
    return EagerNet(fused), "plain modules"


class EagerNet(nn.Module):
    """A copy of a fused network whose modules plain PyTorch calls one by one; its state_dict has the same keys."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        for name, child in copy.deepcopy(fused).named_children():
            self.add_module(name, _eager(child))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> logits (N, num_classes). The children are in the order of the dataflow."""
        for name, child in self.named_children():
            x = child(torch.flatten(x, 1) if name == "fc" else x)
        return x


class EagerBlock(nn.Module):
    """A residual block's modules, one launch a step, as torchvision's blocks run them."""

    def __init__(self, block: FusedBasicBlock | FusedBottleneck) -> None:
        super().__init__()
        self.depth = block.depth
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, inplanes, H, W) -> (N, outplanes, P, Q)."""
        step: dict[str, Any] = self._modules
        y = x
        for i in range(1, self.depth + 1):
            y = step[f"bn{i}"](step[f"conv{i}"](y))
            if i < self.depth:
                y = step["relu"](y)
        y += step["downsample"](x) if "downsample" in step else x
        return step["relu"](y)


def _eager(module: nn.Module) -> nn.Module:
    """``module`` with every fused block and layer in it replaced by its eager form."""
    if isinstance(module, (FusedBasicBlock, FusedBottleneck)):
        return EagerBlock(module)
    if isinstance(module, FusedConvBNReLU):
        return nn.Sequential(OrderedDict(module.named_children()))
    for name, child in module.named_children():
        setattr(module, name, _eager(child))
    return module


def shake(model: nn.Module, seed: int = 0) -> None:
    """Give every BN statistics and weights of a trained look: a fresh net (mean 0, variance 1) hides faulty folding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bn in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            for name, tensor in (*bn.named_parameters(), *bn.named_buffers()):
                if name in ("weight", "running_var"):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                elif name in ("bias", "running_mean"):
                    tensor.uniform_(-0.2, 0.2, generator=generator)
