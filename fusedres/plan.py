"""What a model would launch: its forward and backward walked on meta tensors, each launch with its bytes and FLOPs.

The model itself runs, its own code and the dispatcher's choices included, with no device and no memory.
What a launch reads and writes is in ``fusedres.traffic``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.measure import launches_of
from fusedres.traffic import Call, Part, bytes_of, parts_of

STEM, HEAD = "stem", "head"  # what comes before the first layer and after the last

Phase = Literal["forward", "backward"]
Key = tuple[int, int]  # a storage, and how often it had been written


class Operand(NamedTuple):
    """A tensor as one launch reads or writes it. ``is_activation``: it grows with the batch."""

    key: Key
    bytes: int
    is_activation: bool


class Launch(NamedTuple):
    """One launch. ``ops``: the ops in it, several where launches were fused."""

    ops: tuple[str, ...]
    layer: str
    phase: Phase
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]
    flops: int

    @property
    def bytes(self) -> int:
        return sum(operand.bytes for operand in (*self.reads, *self.writes))

    @property
    def activation_bytes(self) -> int:
        return sum(operand.bytes for operand in (*self.reads, *self.writes) if operand.is_activation)


def walk(model: nn.Module, layers: Mapping[str, nn.Module], x: Tensor, target: Tensor | None = None) -> list[Launch]:
    """Every launch of ``model(x)`` without gradients, or with ``target`` of a training step, in order.

    Without gradients, what follows from the parameters alone (BN folded into weights) is left out: a frozen model has
    it done once.
    ``model``, ``x`` (N, C, H, W) and ``target`` (N,) are on ``meta``. ``layers``: the modules, by name and in the order
    of the dataflow, to which launches are attributed. The step is forward, cross_entropy, backward; no optimizer.
    Raises ValueError for a tensor that is not on ``meta``.
    """
    tensors = [x, *model.parameters(), *model.buffers(), *([] if target is None else [target])]
    if any(not t.is_meta for t in tensors):
        raise ValueError("a plan is made of meta tensors: build the model under torch.device('meta')")
    recorder = _Recorder(x, records_constants=target is not None)
    handles = list(_follow(layers, recorder))
    try:
        with torch.set_grad_enabled(target is not None), recorder:
            y = model.train(target is not None)(x)
            if target is not None:
                loss = F.cross_entropy(y, target)
                recorder.phase = "backward"
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return recorder.launches


def fuse(launches: Iterable[Launch], group_of: Callable[[Launch], Hashable | None]) -> list[Launch]:
    """``launches`` with each group run as one that keeps on the chip what nobody outside it reads.

    ``group_of`` names the group of a launch, None where it stays alone. A group reads what it has not made, once, and
    writes what another launch reads or, as gradients of parameters, none does. Its FLOPs stay. (Sums per channel that
    it reads and hands out as gradients count as kept on the chip: some bytes a channel.)
    """
    launches = list(launches)
    groups = [i if (group := group_of(launch)) is None else group for i, launch in enumerate(launches)]
    readers: dict[Key, set[Hashable]] = {}
    for group, launch in zip(groups, launches, strict=True):
        for operand in launch.reads:
            readers.setdefault(operand.key, set()).add(group)
    members: dict[Hashable, list[Launch]] = {}
    for group, launch in zip(groups, launches, strict=True):
        members.setdefault(group, []).append(launch)
    return [_merge(group, parts, readers) for group, parts in members.items()]


def _merge(group: Hashable, parts: list[Launch], readers: Mapping[Key, set[Hashable]]) -> Launch:
    if len(parts) == 1:
        return parts[0]
    written = {operand.key: operand for part in parts for operand in part.writes}
    read: dict[Key, Operand] = {}
    for operand in (operand for part in parts for operand in part.reads if operand.key not in written):
        if operand.key not in read or read[operand.key].bytes < operand.bytes:
            read[operand.key] = operand
    kept = (operand for operand in written.values() if readers.get(operand.key, set()) != {group})
    ops = tuple(op for part in parts for op in part.ops)
    flops = sum(part.flops for part in parts)
    return Launch(ops, parts[0].layer, parts[0].phase, tuple(read.values()), tuple(kept), flops)


def _follow(layers: Mapping[str, nn.Module], recorder: _Recorder) -> Iterable[Any]:
    """Hooks that tell ``recorder`` in which layer it is, forward and backward. Their handles.

    A tensor's hook runs once its gradient is complete: just before the backward of the layer that made it.
    """

    def enter(name: str, is_first: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if is_first and args[0].requires_grad:
                args[0].register_hook(lambda _: recorder.enter(STEM))
            recorder.enter(name)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            if y.requires_grad:
                y.register_hook(lambda _: recorder.enter(name))
            recorder.enter(HEAD)

        return hook

    for i, (name, module) in enumerate(layers.items()):
        yield module.register_forward_pre_hook(enter(name, i == 0))
        yield module.register_forward_hook(leave(name))


class _Recorder(TorchDispatchMode):
    """Writes down every launch that reaches the dispatcher below autograd."""

    def __init__(self, x: Tensor, records_constants: bool) -> None:
        super().__init__()
        self.layer: str = STEM
        self.phase: Phase = "forward"
        self.launches: list[Launch] = []
        self._records_constants = records_constants
        self._versions: dict[int, int] = {}
        self._of_input = {_storage(x)}  # what follows from ``x``, gradients of weights apart
        # A freed storage's number would be given to another. Tensors must not live on: autograd would copy gradients.
        self._alive: list[torch.UntypedStorage] = []

    def enter(self, layer: str) -> None:
        self.layer = layer

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if launches_of(func, args):
            for part in parts_of(Call(func, args, kwargs or {}, result)):
                self._record(part)
        return result

    def _record(self, part: Part) -> None:
        follows = any(_storage(tensor) in self._of_input for tensor, _ in part.reads)
        reads = tuple(self._operand(tensor, nbytes) for tensor, nbytes in part.reads)
        for tensor in part.writes:
            storage = _storage(tensor)
            self._alive.append(tensor.untyped_storage())
            self._versions[storage] = self._versions.get(storage, 0) + 1
            if follows and not (part.writes_weight and tensor is part.writes[0]):
                self._of_input.add(storage)
        writes = tuple(self._operand(tensor, bytes_of(tensor)) for tensor in part.writes)
        if follows or self._records_constants:
            self.launches.append(Launch((part.op,), self.layer, self.phase, reads, writes, part.flops))

    def _operand(self, tensor: Tensor, nbytes: int) -> Operand:
        storage = _storage(tensor)
        is_activation = tensor.dim() == 4 and storage in self._of_input
        return Operand((storage, self._versions.get(storage, 0)), nbytes, is_activation)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
