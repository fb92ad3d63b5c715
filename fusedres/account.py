"""Which convs of a model run fused, and why the others do not."""

from __future__ import annotations

from torch import nn

from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.chains import Chain
from fusedres.functional import ConvBN, chain_reason
from fusedres.fused_class import is_converted, owner_reason, plan_of
from fusedres.inspection import may_call_convs, pool_reason
from fusedres.layers import FusedConvBNReLU
from fusedres.resnet import StagedNet

BuiltIn = FusedBasicBlock | FusedBottleneck | FusedConvBNReLU | StagedNet


def unfused_convs(model: nn.Module) -> dict[str, str]:
    """The reason for every conv of ``model`` that runs unfused, by name."""
    fused = built_in_convs(model)
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():  # callers come before what they call, whose reasons are closer
        if isinstance(module, BuiltIn):
            if (reason := built_in_reason(module)) is not None:
                reasons.update(dict.fromkeys(built_in_chain(module).convs, reason))
        elif may_call_convs(module):
            below = [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
            reason = owner_reason(module)
            plan = plan_of(module) if reason is None else None
            if plan is None or plan.refusal is not None:
                reasons.update(dict.fromkeys(below, str(plan.refusal if plan else reason)))
                continue
            reasons.update(plan.reasons)
            convs = [conv for chain in plan.chains for conv in chain.convs]
            if is_converted(module):
                fused.update(convs)
            else:
                reasons.update(dict.fromkeys(convs, "fusedres.fuse has not converted it"))
    return {
        name: reasons.get(conv, "no forward that could be traced calls it")
        for name, conv in model.named_modules()
        if isinstance(conv, nn.Conv2d) and conv not in fused
    }


def built_in_convs(model: nn.Module) -> set[nn.Module]:
    """The convs of ``model`` that modules of ours fuse by themselves."""
    ours = [module for module in model.modules() if isinstance(module, BuiltIn) and built_in_reason(module) is None]
    return {conv for module in ours for conv in built_in_chain(module).convs}


def built_in_chain(module: BuiltIn) -> Chain:
    """What a module of ours fuses by itself; of a network, its stem."""
    if isinstance(module, StagedNet):
        pool = None if module.maxpool is None or pool_reason(module.maxpool) is not None else module.maxpool
        return Chain((ConvBN(module.conv1, module.bn1),), None, False, False, True, (module.relu,), pool=pool)
    if isinstance(module, FusedConvBNReLU):
        return Chain(tuple(module.pairs), None, False, False, isinstance(module.relu, nn.ReLU), (module.relu,))
    activations = (module.relu,) * module.depth
    return Chain(tuple(module.pairs), module.projection, True, module.downsample is None, True, activations)


def built_in_reason(module: BuiltIn) -> str | None:
    """Why it runs its modules one by one, or None."""
    if isinstance(module, StagedNet):
        return chain_reason([ConvBN(module.conv1, module.bn1)], [module.relu])
    return module.reason()
