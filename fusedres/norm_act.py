"""timm's BatchNormAct2d, a BN and its activation in one module, as the two that it is."""

from __future__ import annotations

from torch import nn

from fusedres.inspection import hook_reason, plain_reason


def is_norm_act(module: nn.Module) -> bool:
    """Whether ``module`` is a BatchNormAct2d, told by name so that timm need not be there."""
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__ == "timm.layers.norm_act"


def norm_act_reason(module: nn.Module) -> str | None:
    """Why a BatchNormAct2d is not just a BN and a ReLU or nothing, or None."""
    reason = hook_reason(module) or plain_reason(module.drop, nn.Identity)  # type: ignore[arg-type]  # they are modules
    return reason or plain_reason(module.act, nn.ReLU, nn.Identity)  # type: ignore[arg-type]


def norm_of(module: nn.Module) -> nn.BatchNorm2d:
    """The BN in ``module``, without the activation: another face of the same state, buffers, hooks and mode."""
    bn = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    bn.__dict__ = module.__dict__
    return bn
