"""What a chain's forward or backward calls, recorded once per problem and then called without the Python that chose it.

A training step of ResNet-50 is a thousand launches and calls of ATen. Finding out which, from specs, shapes and
engines, takes the host longer than a GPU needs to do the work; and for the same problem the answer is the same. So the
first call of a problem runs as it is written, the second is recorded while it runs, and those after it run the program.

What a program depends on is its key: the function and its settings, the engine asked for, whether choices are made by
measurement, and of every tensor its dtype, shape, strides, device and alignment. Values are never looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedres import dispatch, tuning
from fusedres.inspection import is_followed
from fusedres.recorder import Outputs, Program, Recorder, Tensors

#: More problems than a training run meets; beyond them everything is forgotten, and recorded anew.
MOST = 1024
_PLAIN = (Tensor, nn.Parameter)
_ALIGNMENT = 16  # bytes of the widest access


class Met(NamedTuple):
    """A problem that was met before: its program, and whether it is known by now that it has none."""

    program: Program | None
    has_none: bool


_met: dict[Hashable, Met] = {}


class _Active(threading.local):
    recorder: Recorder | None = None


_active = _Active()


def recorder() -> Recorder | None:
    """Who records what this thread calls, if anybody does."""
    return _active.recorder


def call(function: Callable[..., Outputs], settings: tuple[Hashable, ...], tensors: Tensors) -> Outputs:
    """``function(*settings, *tensors)``, replayed where it has been recorded.

    ``function`` must be one of tensors alone: it may read their shapes and write to them, but not look at values.
    """
    looks = _looks(tensors) if _may_replay(tensors[0]) else None
    if looks is None:
        return function(*settings, *tensors)
    key = function, settings, dispatch.forced(), tuning.is_on(), torch.backends.cudnn.allow_tf32, looks
    met = _met.get(key)
    if met is None:
        if len(_met) >= MOST:
            _met.clear()
        _met[key] = Met(None, False)
        return function(*settings, *tensors)
    if met.program is not None:
        return met.program(*tensors)
    if met.has_none:
        return function(*settings, *tensors)
    waiting = tuning.undecided()
    _active.recorder = Recorder(tensors)
    try:
        with _active.recorder as recorder:
            outputs = function(*settings, *tensors)
    finally:
        _active.recorder = None
    if tuning.undecided() != waiting:  # no program of choices that are still to be made: the next call makes them
        _met.pop(key, None)
        return outputs
    program = recorder.program(outputs)
    _met[key] = Met(program, program is None)
    return outputs


def _may_replay(first: Tensor | None) -> bool:
    """Whether the engine of such tensors gains by it, and nobody else follows what is called."""
    if first is None or is_followed() or torch._C._len_torch_dispatch_stack():
        return False
    return dispatch.choose("conv_fprop", first.device.type, first.dtype).engine.replays


def _looks(tensors: Tensors) -> tuple[Hashable, ...] | None:
    """What of each tensor decides which kernels run on it, and how; None where one is more than memory with strides.

    Views that negate are resolved by the dispatcher on the way to an op; a tensor given twice is two in a program.
    """
    looks: list[Hashable] = []
    ids = set()
    for t in tensors:
        if t is None:
            looks.append(None)
            continue
        is_memory = type(t) in _PLAIN and torch._C._has_storage(t) and not (t.is_neg() or t._is_zerotensor())
        if not is_memory or id(t) in ids:
            return None
        ids.add(id(t))
        looks.append((t.dtype, t.shape, t.stride(), t.storage_offset(), t.get_device(), t.data_ptr() % _ALIGNMENT))
    return tuple(looks)
