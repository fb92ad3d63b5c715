"""Autocast as eager's convolutions see it: whether it is on, the dtype they compute in, and how to do without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_on(device_type: str) -> bool:
    """Whether autocast is on for this device; it cannot be on the meta device, which has none."""
    return _is_available(device_type) and torch.is_autocast_enabled(device_type)


@torch.compiler.assume_constant_result  # dynamo cannot trace the question in torch 2.11
def _is_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that eager's conv would compute in: autocast's, which leaves float64 alone, or that of ``x``."""
    if is_on(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def suspended(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast on this device."""
    return torch.autocast(device_type, enabled=False) if is_on(device_type) else nullcontext()
