"""What the engines for NVIDIA GPUs ask of a device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

MIN_CAPABILITY = (8, 0)  # bfloat16 and TF32 in tensor cores, asynchronous copies

_planned: ContextVar[tuple[int, int] | None] = ContextVar("fusedres_planned_capability", default=None)


@contextmanager
def planning(capability: tuple[int, int] | None) -> Iterator[None]:
    """Within this context choose as for a GPU of this compute capability, whatever is here."""
    token = _planned.set(capability)
    try:
        yield
    finally:
        _planned.reset(token)


def planned() -> tuple[int, int] | None:
    """The compute capability that ``planning`` set, if any."""
    return _planned.get()


def capability() -> tuple[int, int] | None:
    """The compute capability that is planned for, else that of the current GPU; None where there is no GPU."""
    return planned() or (torch.cuda.get_device_capability() if torch.cuda.is_available() else None)


def is_capturing(device: torch.device) -> bool:
    """Whether what is computed on ``device`` now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def old_device() -> str | None:
    """Why a GPU of this machine is too old, or None."""
    if torch.version.hip is not None:
        return None
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if capability < MIN_CAPABILITY:
            least, found = (".".join(map(str, c)) for c in (MIN_CAPABILITY, capability))
            return f"it needs compute capability {least}, {torch.cuda.get_device_name(i)} has {found}"
    return None


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one thread block may have on ``device``."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the attribute
    return properties.shared_memory_per_block_optin
