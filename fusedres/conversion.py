"""``fuse`` and ``unfuse``: an eager model whose conv-BN(-add)-ReLU chains run fused, and back.

Every module that calls convs itself gets another class (``fused_class``); its modules and its state are as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from fusedres.account import built_in_convs, unfused_convs
from fusedres.fused_class import (
    Plan,
    fused_class,
    is_converted,
    is_derived,
    original_class,
    owner_reason,
    plan_of,
)
from fusedres.inspection import checked_module, may_call_convs


class NotFusedError(RuntimeError):
    """Convolutions that ``fuse(strict=True)`` could not fuse."""


def fuse(model: nn.Module, *, inplace: bool = False, strict: bool = False) -> nn.Module:
    """``model`` with its conv-BN(-add)-ReLU chains fused: a copy, or with ``inplace`` the model itself.

    Modules, state_dict, parameters and hooks are as before, and so are the numbers, in training and in eval. What
    cannot be fused runs as it did; ``fusedres.explain`` says why. TypeError where ``model`` is no module;
    with ``strict``, NotFusedError where a convolution stays unfused.
    """
    model = checked_module(model) if inplace else copy.deepcopy(checked_module(model))
    seen = built_in_convs(model)
    converted = [module for module in model.modules() if _fuses_more(module, seen)]
    converted += [module for module in model.modules() if module not in converted and _leads_to(module, converted)]
    former = {module: type(module) for module in converted}
    for module in converted:
        module.__class__ = fused_class(original_class(module))
    if strict and (unfused := unfused_convs(model)):
        for module, kind in former.items():
            module.__class__ = kind
        lines = (f"\n  {name}: {reason}" for name, reason in unfused.items())
        raise NotFusedError(f"{len(unfused)} convolutions stay unfused:{''.join(lines)}")
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """What ``fuse`` was given, with the state that ``model`` has now: a copy, or with ``inplace`` the model itself."""
    model = checked_module(model) if inplace else copy.deepcopy(checked_module(model))
    for module in filter(is_converted, model.modules()):
        if is_derived(module):
            raise RuntimeError(f"{type(module).__name__} was derived from a fused class; undo that first")
        module.__class__ = original_class(module)
    return model


def _fuses_more(module: nn.Module, seen: set[nn.Module]) -> bool:
    """Whether ``module`` fuses convs, in training or in eval, that are not ``seen`` yet; they are then."""
    if not may_call_convs(module) or owner_reason(module) is not None:
        return False
    convs = {conv for plan in _plans_of_modes(module) for chain in plan.chains for conv in chain.convs}
    fuses_more = not convs <= seen
    seen |= convs
    return fuses_more


def _leads_to(module: nn.Module, converted: list[nn.Module]) -> bool:
    """Whether ``module`` calls any of ``converted``, and may so hand on maps in the format that they work in."""
    is_caller = may_call_convs(module) and owner_reason(module) is None
    return is_caller and plan_of(module).refusal is None and not set(converted).isdisjoint(module.modules())


def _plans_of_modes(module: nn.Module) -> Iterator[Plan]:
    """The plan of ``module`` in the mode that it is in, and in the other one."""
    yield plan_of(module)
    training = module.training
    try:
        module.training = not training
        yield plan_of(module)
    finally:
        module.training = training
