"""Bad calls of modules, made by a process of its own that prints what each raised: its exit may be a signal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fusedres
from fusedres.functional import conv_bn_relu

WIDTH = 16

#: name -> makes a model that takes (N, 16, H, W), or (N, 3, H, W) where it is a network.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: fusedres.FusedBasicBlock(WIDTH, WIDTH),
    "bottleneck": lambda: fusedres.FusedBottleneck(WIDTH, WIDTH // 4),
    "grouped": lambda: fusedres.FusedBottleneck(WIDTH, WIDTH // 4, groups=4),
    "layer": lambda: fusedres.FusedConvBNReLU(WIDTH, WIDTH),
    "network": lambda: fusedres.ResNet(fusedres.FusedBasicBlock, [1, 1, 1, 1], 10),
    "cifar": lambda: fusedres.CifarResNet(1),
    "plain": lambda: fusedres.CifarPlainNet(1),
}

#: what is wrong with the input -> (makes it of a good one, what the message must name)
INPUTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "channels": (lambda x: torch.randn(2, 7, 33, 33), r"7"),
    "3-D": (lambda x: x[0, 0], r"[24]-?D|\(33, 33\)|\[33, 33\]"),
    "5-D": (lambda x: x[None], r"[345]-?D"),
    "int64": (lambda x: x.long(), r"Long|int64|Int"),
    "complex": (lambda x: x.to(torch.complex64), r"[Cc]omplex"),
    "float64": (lambda x: x.double(), r"float64|[Dd]ouble"),
    "sparse": (lambda x: x.to_sparse(), r"[Ss]parse|memory format"),
    "meta": (lambda x: x.to("meta"), r"meta"),
    "list": (lambda x: [1, 2, 3], r"list"),
    "None": (lambda x: None, r"None"),
}


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def convs(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def _replace(model: nn.Module, name: str, size: int) -> None:
    tensor = torch.ones(size)
    setattr(norms(model)[-1], name, nn.Parameter(tensor) if name in ("weight", "bias") else tensor)


#: what is wrong with the model -> (breaks a good one, what the message must name)
STATES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "empty running_mean": (lambda m: _replace(m, "running_mean", 0), "running_mean"),
    "short running_mean": (lambda m: _replace(m, "running_mean", 3), "running_mean"),
    "long running_var": (lambda m: _replace(m, "running_var", 99), "running_var"),
    "short BN weight": (lambda m: _replace(m, "weight", 1), "weight"),
    "long BN bias": (lambda m: _replace(m, "bias", 99), "bias"),
    "short conv bias": (lambda m: setattr(convs(m)[-1], "bias", nn.Parameter(torch.ones(3))), "bias"),
    "weight on meta": (lambda m: convs(m)[-1].to("meta"), "meta"),
    "float64 weight": (lambda m: convs(m)[-1].double(), r"float64|[Dd]ouble"),
    "3-D weight": (lambda m: setattr(convs(m)[-1], "weight", nn.Parameter(torch.ones(WIDTH, 3, 3))), "weight"),
    "zero stride": (lambda m: setattr(convs(m)[-1], "stride", (0, 0)), "stride"),
    "negative padding": (lambda m: setattr(convs(m)[-1], "padding", (-1, -1)), "padding"),
    "zero dilation": (lambda m: setattr(convs(m)[-1], "dilation", (0, 0)), "dilation"),
    "three strides": (lambda m: setattr(convs(m)[-1], "stride", (1, 1, 1)), "integers"),
    "zero groups": (lambda m: setattr(convs(m)[-1], "groups", 0), "groups"),
    "other groups": (lambda m: setattr(convs(m)[-1], "groups", 3), "groups|channels"),
}


def good_input(model: str) -> Tensor:
    return torch.randn(2, 3 if model in ("network", "cifar", "plain") else WIDTH, 33, 33)


def outcome(model: nn.Module, call: Callable[[], object]) -> str:
    """The error that ``call`` raised, or that it raised none; and whether it changed a buffer of ``model``."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        call()
        said = "accepted"
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    moved = any(not torch.equal(buffer, kept) for buffer, kept in before)
    return said + (" (statistics moved)" if moved else "")


def calls() -> Iterator[tuple[str, str, str]]:
    """(model, fault, outcome) of every bad call, in train and eval, with and without gradients."""
    for name, make in MODELS.items():
        for fault in (*INPUTS, *STATES):
            for training in (True, False):
                model, x = make().train(training), good_input(name)
                if fault in INPUTS:
                    x = INPUTS[fault][0](x)
                else:
                    STATES[fault][0](model)
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        yield name, fault, outcome(model, lambda model=model, x=x: model(x))
    conv, bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    for fault, arguments in {
        "no conv": (good_input("layer"), None, bn),
        "no norm": (good_input("layer"), conv, None),
        "a BN for another number of channels": (torch.randn(2, 4, 5, 5), conv, nn.BatchNorm2d(5)),
    }.items():
        yield "conv_bn_relu", fault, outcome(bn, lambda arguments=arguments: conv_bn_relu(*arguments))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with fusedres.engine(sys.argv[1]):
        for row in calls():
            print("\t".join(row), flush=True)
