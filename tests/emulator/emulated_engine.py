"""The ``cuda`` engine on CPU tensors: its own planning, with emulated kernels in the place of the native ops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import emulated
import emulated_tails
import torch
from build_emulator import load
from torch import Tensor

from fusedres import dispatch
from fusedres.engines import cuda
from fusedres.engines.cuda import CUDAEngine
from fusedres.engines.reference import REFERENCE

Pairs = list[tuple[Tensor, Tensor]]


class EmulatedCUDA(CUDAEngine):
    """The engine where its kernels take CPU tensors and a block has ``limit`` bytes of shared memory."""

    missing = None
    device_type = "cpu"
    limit = emulated.SHARED_LIMIT

    def shared_memory(self, device: torch.device) -> int:
        return self.limit


def _bottleneck(x: Tensor, *operands: object) -> Tensor:
    w1, b1, w2, b2, w3, b3, w_shortcut, stride = operands
    return emulated.bottleneck_fprop(x, [(w1, b1), (w2, b2), (w3, b3)], w_shortcut, stride)[0]  # type: ignore[arg-type,list-item]


def _basic_block(x: Tensor, *operands: object) -> Tensor:
    w1, b1, w2, b2, w_shortcut, stride = operands
    return emulated.basic_block_fprop(x, [(w1, b1), (w2, b2)], w_shortcut, stride)[0]  # type: ignore[arg-type,list-item]


def _stem(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return emulated.stem_fprop(x, w, bias)[0]


def _head(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return emulated.head_fprop(x, w, bias)[0]


_library = torch.library.Library("fusedres_cuda", "IMPL")
for _name, _function in (
    ("bottleneck_fprop", _bottleneck),
    ("basic_block_fprop", _basic_block),
    ("stem_fprop", _stem),
    ("head_fprop", _head),
    ("scale_shift_add_relu", emulated_tails.scale_shift_add_relu),
    ("drelu_dbn", emulated_tails.drelu_dbn),
    ("dbn", emulated_tails.dbn),
    ("channel_stats", emulated_tails.channel_stats),
    ("bn_finalize", emulated_tails.bn_finalize),
):
    _library.impl(_name, _function, "CPU")


def _shared_bytes(kernel: str, width: int, stride: int) -> int:
    module = load("fusedres_emulator")
    if kernel == "bottleneck_fprop":
        return module.bottleneck_shared_bytes(width, stride)
    return module.basic_block_shared_bytes(width)


@contextmanager
def emulated_engine() -> Iterator[EmulatedCUDA]:
    """Within this context there are two engines: this one, and behind it ``reference``, which runs a launch a conv."""
    engine = EmulatedCUDA()
    engines = {"cuda": engine, "reference": REFERENCE}
    with mock.patch.object(dispatch, "ENGINES", engines), mock.patch.object(cuda, "_shared_bytes", _shared_bytes):
        dispatch._choose.cache_clear()
        try:
            yield engine
        finally:
            dispatch._choose.cache_clear()
