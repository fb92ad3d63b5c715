"""A guard notices every change of a module but one inside a tensor."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn.modules import module as module_globals

from fusedres.guards import Guard, all_hold


class Scaled(nn.Conv2d):
    """A conv that computes something else."""


def replace_forward(conv: nn.Conv2d) -> None:
    conv.forward = conv.forward  # type: ignore[method-assign]


def change_class(conv: nn.Conv2d) -> None:
    conv.__class__ = Scaled


CHANGES: dict[str, Callable[[nn.Conv2d], object]] = {
    "training": lambda conv: conv.eval(),
    "stride": lambda conv: setattr(conv, "stride", (2, 2)),
    "padding mode": lambda conv: setattr(conv, "padding_mode", "reflect"),
    "another parameter": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight.detach().clone())),
    "no bias": lambda conv: setattr(conv, "bias", None),
    "a new attribute": lambda conv: setattr(conv, "note", 1),
    "another class": change_class,
    "another forward": replace_forward,
    "a forward hook": lambda conv: conv.register_forward_hook(lambda *_: None),
    "a pre-hook": lambda conv: conv.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda conv: conv.register_full_backward_hook(lambda *_: None),
    "a parametrization": lambda conv: nn.utils.parametrizations.weight_norm(conv),
    "pruning": lambda conv: nn.utils.prune.random_unstructured(conv, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_module_breaks_the_guard(change: Callable[[nn.Conv2d], object]) -> None:
    conv = nn.Conv2d(4, 4, 3, bias=True)
    guard = Guard.of(conv)
    assert guard.holds(conv)
    change(conv)
    assert not guard.holds(conv)


def test_a_hook_removed_again_makes_it_hold_again() -> None:
    conv = nn.Conv2d(4, 4, 3)
    guard = Guard.of(conv)
    handle = conv.register_forward_hook(lambda *_: None)
    handle.remove()
    assert guard.holds(conv)


def test_a_global_hook_breaks_all() -> None:
    relu = nn.ReLU()
    guards = (Guard.of(relu),)
    assert all_hold(guards, (relu,))
    assert not all_hold(guards, (nn.ReLU(),))
    assert not all_hold(guards, ())
    handle = module_globals.register_module_forward_hook(lambda *_: None)
    try:
        assert not all_hold(guards, (relu,))
    finally:
        handle.remove()
    assert all_hold(guards, (relu,))


def test_a_change_inside_a_tensor_is_for_others_to_see() -> None:
    bn = nn.BatchNorm2d(4)
    guard = Guard.of(bn)
    with torch.no_grad():
        bn.weight.add_(1)
    assert guard.holds(bn)
