"""The ``triton`` engine: the kernels of kernels/, on CUDA tensors.

Triton and the kernels are imported when an op first needs them, for that takes long and Triton may be absent. Where
TRITON_INTERPRET=1 was set from the start, the kernels run under Triton's interpreter, and whoever asks for the engine
by name gets it for CPU tensors too: slow, and for proofs alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedres.engines import Engine
from fusedres.engines.nvidia import old_device

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The module of fusedres.kernels in which each op lies, under its own name.
_MODULES = {
    "conv_fprop": "conv_fprop",
    "conv_dgrad": "conv_dgrad",
    "conv_dgrad_drelu_dbn": "conv_dgrad",
    "conv_wgrad": "conv_wgrad",
    "conv_projection": "conv_projection",
    "scale_shift_add_relu": "tails",
    "drelu_dbn": "tails",
    "dbn": "tails",
    "bn_finalize": "bn_finalize",
    "bn_constants": "bn_finalize",
    "bn_fold": "bn_finalize",
    "cast": "cast",
    "pointwise_stats": "pointwise",
    "bn_relu_maxpool": "pool",
    "bn_relu_maxpool_backward": "pool",
}


class TritonEngine(Engine):
    """See the module's docstring. Units are stored, never closed: statistics leave the convs' epilogues."""

    name = "triton"
    fuses_prologue = True
    adds_projection = True
    flops_per_byte = 0
    replays = True

    @functools.cached_property
    def missing(self) -> str | None:  # type: ignore[override]  # asked for, it may import Triton
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        try:
            for module in sorted(set(_MODULES.values())):
                importlib.import_module(f"fusedres.kernels.{module}")
        except Exception as error:  # whatever keeps Triton from being imported is a reason, not a crash
            return f"triton does not import: {type(error).__name__}: {error}"
        return None

    def rejects(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cuda" and not (device_type == "cpu" and interpreted()):
            return f"it computes on CUDA devices, the tensors are on {device_type}"
        if dtype not in _DTYPES:
            return f"it has no kernels for {dtype}"
        if op not in _MODULES:
            return "it stores every conv's output, so that it needs no such op"
        return self.missing or (old_device() if device_type == "cuda" else None)

    def only_by_name(self, device_type: str) -> str | None:
        return "the interpreter serves CPU tensors only where it is asked for by name" if device_type == "cpu" else None

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in _MODULES:
            return super().__getattr__(op)
        kernel = getattr(importlib.import_module(f"fusedres.kernels.{_MODULES[op]}"), op)
        call = _on_device_of_first(kernel)
        setattr(self, op, call)  # the next call finds it without asking here
        return call


@functools.cache
def interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter: Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def _on_device_of_first(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: make it that of the tensors."""

    @functools.wraps(kernel)
    def call(first: Tensor, *args: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return kernel(first, *args)
        with torch.cuda.device(first.device):
            return kernel(first, *args)

    return call


TRITON = TritonEngine()
