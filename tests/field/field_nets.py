"""What the field cases are made of: the two ways to a fused model, its eager twin, and how their tensors compare."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torchvision
from oracles import shake
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

import fusedres

Make = Callable[[Any], nn.Module]

#: The two zoos that a model can be made from: torchvision's classes and constructors, and ours of the same names.
EAGER = SimpleNamespace(
    BasicBlock=torchvision_resnet.BasicBlock,
    Bottleneck=torchvision_resnet.Bottleneck,
    ResNet=torchvision.models.ResNet,
    resnet18=torchvision.models.resnet18,
    resnext50_32x4d=torchvision.models.resnext50_32x4d,
)
FUSED = SimpleNamespace(
    BasicBlock=fusedres.FusedBasicBlock,
    Bottleneck=fusedres.FusedBottleneck,
    ResNet=fusedres.ResNet,
    resnet18=fusedres.resnet18,
    resnext50_32x4d=fusedres.resnext50_32x4d,
)


class Place(NamedTuple):
    """An engine and the device of its tensors."""

    engine: str
    device: str

    def __str__(self) -> str:
        return self.engine if self.device == "cpu" else f"{self.engine}-{self.device}"

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype that the engine has kernels for."""
        return torch.float32 if self.engine == "triton" else torch.float64

    @property
    def is_interpreted(self) -> bool:
        """Whether kernels run under an interpreter, a thousand times slower than compiled."""
        return self.engine == "triton" and self.device == "cpu"

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype == torch.float32 else 1e-10

    def put(self, *values: Any) -> Any:
        """Modules and tensors moved here, in the dtype of this place."""
        moved = tuple(value.to(self.device, self.dtype) for value in values)
        return moved if len(moved) > 1 else moved[0]


def resnet18(zoo: Any, **options: Any) -> nn.Module:
    return zoo.resnet18(**options)


def small_net(zoo: Any, **options: Any) -> nn.Module:
    """A network with one basic block a stage."""
    return zoo.ResNet(zoo.BasicBlock, [1, 1, 1, 1], 10, **options)


def small_bottleneck_net(zoo: Any, **options: Any) -> nn.Module:
    """A network with one bottleneck a stage."""
    return zoo.ResNet(zoo.Bottleneck, [1, 1, 1, 1], 10, **options)


@functools.cache
def _made(make: Make, is_eager: bool) -> nn.Module:
    torch.manual_seed(0)
    return shake(make(EAGER)) if is_eager else make(FUSED)


def eager_net(make: Make) -> nn.Module:
    """A shaken ``make(EAGER)``, always of the same weights."""
    return copy.deepcopy(_made(make, True))


def built(make: Make, eager: nn.Module) -> nn.Module:
    """The model of our own constructors with the weights, momenta and mode of ``eager``."""
    model = copy.deepcopy(_made(make, False)).to(next(eager.parameters()).dtype)
    model.load_state_dict(eager.state_dict())
    for name, module in eager.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            model.get_submodule(name).momentum = module.momentum
    return model.train(eager.training)


def converted(make: Make, eager: nn.Module) -> nn.Module:
    """``eager`` itself, converted."""
    return fusedres.fuse(eager)


#: The ways to a fused model.
WAYS: dict[str, Callable[[Make, nn.Module], nn.Module]] = {"built": built}
if hasattr(fusedres, "fuse"):
    WAYS["converted"] = converted


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float, what: str = "") -> None:
    """Of one shape and dtype, and apart by at most ``tolerance`` of the largest entry, or of 1."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), what
    atol = tolerance * max(1.0, theirs.detach().abs().max().item() if theirs.numel() else 1.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


def assert_all_near(ours: Iterable[tuple[str, Tensor]], theirs: Iterable[tuple[str, Tensor]], tolerance: float) -> None:
    """The same names in the same order, and near each other; integers equal."""
    ours, theirs = list(ours), list(theirs)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, mine), (_, other) in zip(ours, theirs, strict=True):
        if other.is_floating_point():
            assert_near(mine, other, tolerance, name)
        else:
            assert torch.equal(mine, other), name


def gradients(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The gradient of every parameter that has one."""
    return [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]


def same_bits(module: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether the state of ``module`` is ``state``, bit for bit."""
    now = module.state_dict()
    return list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)


def saved(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
