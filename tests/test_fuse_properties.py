"""``fuse`` on modules that nobody wrote: forwards of random calls, in any mode, against the same forwards in eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import event, example, given
from hypothesis import strategies as st
from networks import as_maps
from oracles import Results, batch, shake, step
from sensitivity import assert_as_eager, outputs
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

import fusedres

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 4
WIGGLE = 1e-13  # some hundred roundings in float64

#: Modules that a forward calls, each instance once unless "again" calls it anew.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
    "conv with bias": lambda: nn.Conv2d(WIDTH, WIDTH, 1),
    "grouped conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2, groups=2),
    "reflecting conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect"),
    "norm": lambda: nn.BatchNorm2d(WIDTH),
    "frozen norm": lambda: FrozenBatchNorm2d(WIDTH),
    "norm without statistics": lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
    "norm without weights": lambda: nn.BatchNorm2d(WIDTH, momentum=None, affine=False),
    "instance norm": lambda: nn.InstanceNorm2d(WIDTH, affine=True),  # no GroupNorm: its backward crashes in torch 2.11
    "norm with relu": lambda: timm.layers.BatchNormAct2d(WIDTH),
    "relu": lambda: nn.ReLU(),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "identity": lambda: nn.Identity(),
    "dropout": lambda: nn.Dropout(0.0),
    "conv and norm": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)),
    "conv, norm and relu": lambda: nn.Sequential(
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)
    ),
    "block": lambda: BasicBlock(WIDTH, WIDTH),
    "stage": lambda: nn.Sequential(BasicBlock(WIDTH, WIDTH), BasicBlock(WIDTH, WIDTH)),
    "max pool": lambda: nn.MaxPool2d(3, 1, 1),
}

#: What else a forward does with a tensor ``a``, and another one ``b``; it may change them.
EXPRESSIONS = {
    "F.relu": "F.relu({a})",
    "F.relu in place": "F.relu({a}, inplace=True)",
    "relu_": "{a}.relu_()",
    "silu": "F.silu({a})",
    "+": "{a} + {b}",
    "torch.add": "torch.add({a}, {b})",
    "scaled add": "torch.add({a}, {b}, alpha=0.5)",
    "add_": "{a}.add_({b})",
    "mean": "{a} + {b}.mean((2, 3), keepdim=True)",
    "gate": "{a} * torch.sigmoid({b})",
    "halved": "{a}.mul_(0.5)",
    "view": "{a}[:, :]",
    "flat": "{a}.flatten(2).view_as({a})",
    "cat": "torch.cat([{a}, {b}], 1)[:, ::2]",
    "pool": "F.max_pool2d({a}, 3, 1, 1)",
    "detach": "{a}.detach()",
    "head": "{b} * self.fc(torch.flatten(self.avgpool({a}), 1))[:, :, None, None]",
}

#: Runs of calls as real networks have them, each on what the one before returned.
IDIOMS = [
    *[
        ("conv", "norm", "relu"),
        ("conv", "norm", "relu in place"),
        ("conv", "norm"),
        ("conv with bias", "norm", "F.relu"),
    ],
    *[
        ("conv", "norm", "+", "relu in place"),
        ("conv", "norm", "+="),
        ("conv", "norm", "relu_"),
        ("conv", "identity", "norm"),
    ],
    *[("grouped conv", "frozen norm", "relu"), ("conv", "norm with relu"), ("conv", "norm without statistics", "relu")],
    *[("conv", "norm without weights", "add_", "relu"), ("conv and norm", "+", "relu"), ("conv and norm", "relu")],
    *[("conv", "norm", "relu", "max pool", "stage"), ("conv, norm and relu", "block", "stage"), ("stage", "head")],
]


class Call(NamedTuple):
    """One statement of a forward: what it does, and to which of the values so far (0 is the last one)."""

    what: str
    a: int = 0
    b: int = 1


class Program(NamedTuple):
    """A forward of calls; the values that it returns, and which BNs are in training, in turn."""

    calls: tuple[Call, ...]
    results: tuple[int, ...] = (0,)
    trains: tuple[bool, ...] = (True,)


@st.composite
def programs(draw: Any) -> Program:
    whats = [*MODULES, *EXPRESSIONS, "+=", "again"]
    idiom = st.one_of(
        st.sampled_from(IDIOMS), st.sampled_from(IDIOMS), st.sampled_from(whats).map(lambda what: (what,))
    )
    operand = st.sampled_from([0, 0, 0, 0, 1, 2, 3])
    calls = []
    for idiom_ in draw(st.lists(idiom, min_size=1, max_size=5)):
        for i, what in enumerate(idiom_):
            calls.append(Call(what, draw(operand) if i == 0 else 0, draw(st.integers(1, 6))))
    results = draw(st.one_of(st.just((0,)), st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple)))
    return Program(tuple(calls), results, tuple(draw(st.lists(st.booleans(), min_size=1, max_size=3))))


def source_of(program: Program) -> tuple[str, dict[str, str]]:
    """The forward as Python, and the modules it calls: name -> kind."""
    values, modules, lines = ["x"], {}, []
    for i, (what, *operands) in enumerate(program.calls):
        a, b = (values[-1 - operand % len(values)] for operand in operands)
        if what == "again" and modules:
            expression = f"self.{list(modules)[operands[1] % len(modules)]}({a})"
        elif what in MODULES:
            modules[f"m{i}"] = what
            expression = f"self.m{i}({a})"
        else:
            expression = EXPRESSIONS.get(what, "{a}").format(a=a, b=b)
        lines.append(f"v{i} = {expression}")
        if what == "+=":
            lines.append(f"v{i} += {b}")
        values.append(f"v{i}")
    returned = ", ".join(values[-1 - result % len(values)] for result in program.results)
    return "\n    ".join(["def forward(self, x):", *lines, f"return {returned}"]), modules


def eager_of(program: Program) -> nn.Module:
    """A module with that forward, shaken, in float64."""
    torch.manual_seed(0)
    source, modules = source_of(program)
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    exec(source, namespace)
    net = type("Drawn", (nn.Module,), {"forward": namespace["forward"]})()
    for name, kind in modules.items():
        net.add_module(name, MODULES[kind]())
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(WIDTH, WIDTH)
    return shake(net).double()


class Joined(nn.Module):
    """``net`` with its results side by side as maps of one pixel, the shape that a step works with."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return torch.cat([t.flatten(1) for t in (y if isinstance(y, tuple) else (y,))], 1)


def norms(net: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in net.modules() if isinstance(module, nn.BatchNorm2d))


@given(programs())
@example(
    Program((Call("conv"), Call("norm"), Call("relu"), Call("conv"), Call("norm"), Call("+=")), results=(1,))
)  # the norm's output by the name it had before the add
@example(
    Program((Call("conv"), Call("halved", 1), Call("norm", 1), Call("relu")), trains=(False,))
)  # a write into the input, between the conv and its norm
def test_fused_forward_of_random_calls_computes_what_eager_computes(program: Program) -> None:
    eager = eager_of(program)
    fused = fusedres.fuse(eager)
    for net in (fused, eager):
        for i, bn in enumerate(norms(net)):
            bn.train(program.trains[i % len(program.trains)])
    x = batch(2, WIDTH, 6, 7, dtype=torch.float64)
    ours, theirs = as_maps(Joined(fused)), as_maps(Joined(eager))
    event(f"{len(fusedres.explain(fused))} convs, {fusedres.explain(fused).fused} fused")
    for run in (step, outputs_for_a_copy, outputs_for_a_copy):
        if run is step and not differentiable(theirs, x):
            event("not differentiable")
            continue
        check = partial(assert_as_eager, wiggle=WIGGLE)
        check(ours, theirs, x, run)
        written, expected = x.clone(), x.clone()
        with torch.no_grad():
            copy.deepcopy(ours)(written), copy.deepcopy(theirs)(expected)
        torch.testing.assert_close(written, expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        for _ in range(3):  # from the third call on chains in a row run at once
            torch.testing.assert_close(ours(x.clone()), theirs(x.clone()), rtol=1e-8, atol=1e-8)


def outputs_for_a_copy(net: nn.Module, x: Tensor) -> Results:
    """A forward may write into its input."""
    return outputs(net, x.clone())


def differentiable(net: nn.Module, x: Tensor) -> bool:
    """Whether eager can: a forward may write into what the backward of an earlier call reads."""
    try:
        step(net, x)
    except RuntimeError:
        return False
    return True
