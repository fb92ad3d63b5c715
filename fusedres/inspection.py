"""What may be fused: modules of the exact types known here, with nothing attached that a fused call would skip."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module_globals

from fusedres.problem import as_pair

#: The winning tap of a window is stored in eight bits.
MAX_POOL_KERNEL = 16


def checked_module(model: object) -> nn.Module:
    """``model``, if it is a module; TypeError else."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return model


def may_call_convs(module: nn.Module) -> bool:
    """Whether there is a conv below ``module``, and a forward that could call it."""
    has_forward = type(module).forward is not nn.Module.forward
    return has_forward and any(isinstance(m, nn.Conv2d) for m in module.modules() if m is not module)


def plain_reason(module: nn.Module, *types: type[nn.Module]) -> str | None:
    """Why ``module`` is more than a plain instance of one of ``types``, or None if it is just that.

    Subclasses are refused (parametrized modules are subclasses too): they may compute something else.
    """
    if type(module) not in types:
        return f"{type(module).__name__} is not exactly {' or '.join(t.__name__ for t in types)}"
    return hook_reason(module)


def hook_reason(module: nn.Module) -> str | None:
    """Why calling ``module`` is more than calling its class's forward, or None. Asked at every call, so kept quick."""
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"a hook is attached to a {type(module).__name__}"
    if "forward" in state:
        return f"the forward of a {type(module).__name__} was replaced"
    return "a global module hook is attached" if has_global_hooks() else None


def has_global_hooks() -> bool:
    """Whether a hook is attached to every module at once."""
    return bool(
        _module_globals._global_forward_hooks
        or _module_globals._global_forward_pre_hooks
        or _module_globals._global_backward_hooks
        or _module_globals._global_backward_pre_hooks
    )


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` records what is called now."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]  # torch.jit does export it


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode AD follows op by op what is called now."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_followed() -> bool:
    """Whether a compiler, ``torch.jit.trace``, ``torch.func`` or forward-mode AD follows what is called now."""
    return torch.compiler.is_compiling() or is_traced() or is_transformed()


def is_observed() -> bool:
    """Whether a dispatch mode, such as a counter of FLOPs, sees every op that is called now."""
    return torch._C._len_torch_dispatch_stack() > 0


def recorder_reason() -> str | None:
    """Why the modules must run one by one for whoever records or transforms this call, or None.

    TorchScript and ONNX know no fused ops; what they record must be ATen's, on parameters and not on folded copies.
    Fused ops have neither batching rules nor tangents, and gradients of theirs none of their own: a transform would
    lose what it follows, unseen.
    """
    if is_traced():
        return "TorchScript records the call"
    if is_transformed():
        return "torch.func or forward-mode AD follows the call"
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "ONNX records the call"
    return None


def conv_reason(conv: nn.Module) -> str | None:
    """Why ``conv`` cannot be fused, or None."""
    reason = plain_reason(conv, nn.Conv2d)
    if reason is not None or not isinstance(conv, nn.Conv2d):
        return reason
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return "padding 'same' is uneven for an even kernel"
    return None


def batch_norm_reason(bn: nn.Module) -> str | None:
    """Why ``bn`` cannot be fused, or None."""
    if is_frozen_batch_norm(bn):
        return hook_reason(bn)
    reason = plain_reason(bn, nn.BatchNorm2d, nn.SyncBatchNorm)
    if reason is not None:
        return reason
    if (bn.running_mean is None) != (bn.running_var is None):
        return "a BN with only one of its running statistics"
    return None


def pool_reason(pool: nn.Module) -> str | None:
    """Why the max-pool ``pool`` cannot join the stem's BN and ReLU, or None."""
    reason = plain_reason(pool, nn.MaxPool2d)
    if reason is not None or not isinstance(pool, nn.MaxPool2d):
        return reason
    if any(len(set(as_pair(v))) > 1 for v in (pool.kernel_size, pool.stride, pool.padding)):
        return "a max-pool that is not square"
    if as_pair(pool.dilation) != (1, 1) or pool.ceil_mode or pool.return_indices:
        return "a max-pool with dilation, ceil_mode or return_indices"
    if as_pair(pool.kernel_size)[0] > MAX_POOL_KERNEL:
        return f"a max-pool window of more than {MAX_POOL_KERNEL} pixels a side"
    return None


def head_reason(avgpool: nn.Module, fc: nn.Module) -> str | None:
    """Why ``fc`` of the means that ``avgpool`` makes is not just that, or None."""
    reason = plain_reason(avgpool, nn.AdaptiveAvgPool2d) or plain_reason(fc, nn.Linear)
    if reason is not None:
        return reason
    if not isinstance(avgpool, nn.AdaptiveAvgPool2d) or avgpool.output_size not in (1, (1, 1), [1, 1]):
        return "a pool that is not global"
    return None


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is of one of the BN classes that can be fused, whatever is attached to it."""
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_frozen_batch_norm(module)


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is torchvision's FrozenBatchNorm2d, told by name so that torchvision need not be there."""
    kind = type(module)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc"
