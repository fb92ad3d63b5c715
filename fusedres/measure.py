"""Counting and timing: launches, bytes kept for backward, interleaved samples. One rule for eager and fused alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: ATen ops that hand out memory or metadata and compute nothing, and are no views by their schema.
_FREE = frozenset(
    {
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::_unsafe_view",
        "aten::_reshape_alias",
        "aten::as_strided_",
        "aten::lift_fresh",
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::set_",
        "aten::resize_",
        "aten::is_same_size",
    }
)


@dataclass(frozen=True)
class Launches:
    """How many launches a call and its backward pass make, and how often each op is among them."""

    forward: int
    backward: int
    forward_ops: Mapping[str, int]
    backward_ops: Mapping[str, int]


class _LaunchCounter(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd; what an op calls inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        launches = launches_of(func, args)
        if launches:
            name = func._schema.name
            self.ops[name] = self.ops.get(name, 0) + launches
        return func(*args, **(kwargs or {}))


def launches_of(func: Any, args: tuple) -> int:
    """How many launches one call of the op ``func`` makes.

    A view or an allocation makes none; ``convolution_backward`` makes one for each gradient asked of it (dgrad,
    wgrad, bias); every other op, of ATen or of fusedres, makes one. An engine may need several passes for one op, as
    ATen may: that is not seen here.
    """
    if func._schema.name in _FREE or func.is_view:
        return 0
    if func._schema.name == "aten::convolution_backward":
        return sum(args[-1])
    return 1


def count_launches(fn: Callable[[], Tensor]) -> Launches:
    """Launches of ``fn()``, and of the backward pass from its result where that requires grad.

    The incoming gradient is made outside the count. Gradients are accumulated into the leaves, as ``backward`` does.
    """
    with _LaunchCounter() as forward:
        y = fn()
    backward = _LaunchCounter()
    if y.requires_grad:
        dy = torch.ones_like(y)
        with backward:
            y.backward(dy)
    return Launches(sum(forward.ops.values()), sum(backward.ops.values()), forward.ops, backward.ops)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that ``model(x)`` keeps for its backward pass: the distinct storages behind all saved tensors.

    A storage counts once and whole, however many views of it are saved. Parameters, buffers and the input are left
    out: they exist whatever the model does.
    """
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is kept whole keeps its node, which keeps it: freed by nobody

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)  # the graph must live while storages are told apart by their addresses
    del y
    return sum(saved.values())


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on ``device``; nothing to do on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleaved(
    fns: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | str = "cpu",
    warmup: int = 1,
    on_round: Callable[[int], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call, the contestants taking turns (A B C A B C ...) so that a drift of the machine hits all.

    ``warmup`` rounds are run first and not recorded. ``on_round(done)`` is called after each recorded round.
    """
    device = torch.device(device)
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(-warmup, rounds):
        for name, fn in fns.items():
            synchronize(device)
            start = time.perf_counter()
            fn()
            synchronize(device)
            if turn >= 0:
                samples[name].append(time.perf_counter() - start)
        if on_round is not None and turn >= 0:
            on_round(turn + 1)
    return samples


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """``step`` as one CUDA graph: what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # allocations, choices of algorithms, compilation
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each contestant's samples, in seconds."""
    return {name: statistics.median(times) for name, times in samples.items()}
