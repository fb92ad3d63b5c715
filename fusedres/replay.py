"""Programs: what a chain's forward or backward calls, recorded once per problem and called again without its Python.

A training step of ResNet-50 is 541 launches and some 600 calls of ATen. Finding out which, from specs, shapes and engines,
takes the host longer than a GPU needs to do the work; and for the same problem the answer is the same. So the first call
of a problem runs as it is written, the second is recorded while it runs, and those after it run the recording: a
``torch.fx`` graph of launches with everything but their tensors settled, and of ATen's and our own native ops.

What a recording depends on is in its key: the function and its settings, the engine asked for, and of every tensor its
dtype, shape, strides, device and alignment. Values are never looked at.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import increment_version
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fusedres import dispatch, ops

aten = torch.ops.aten

Tensors = Sequence[Tensor | None]
Run = Callable[..., tuple[Tensor | None, ...]]

#: More problems than a training run meets; beyond them everything is forgotten, and recorded anew.
MOST = 1024


class Seen(NamedTuple):
    """A problem that was met before: its program, if it has been recorded and could be, else how often it was met."""

    program: Run | None
    is_final: bool


_seen: dict[Hashable, Seen] = {}


class _Active(threading.local):
    recorder: Recorder | None = None


_active = _Active()


def call(function: Run, settings: tuple[Hashable, ...], tensors: Tensors) -> tuple[Tensor | None, ...]:
    """``function(*settings, *tensors)``, replayed where it has been recorded.

    ``function`` must be one of tensors alone: it may read their shapes and write to them, but not look at values.
    """
    if not _may_replay(tensors):
        return function(*settings, *tensors)
    key = function, settings, dispatch.forced(), torch.backends.cudnn.allow_tf32, tuple(map(_look, tensors))
    seen = _seen.get(key)
    if seen is None:
        if len(_seen) >= MOST:
            _seen.clear()
        _seen[key] = Seen(None, False)
        return function(*settings, *tensors)
    if seen.program is not None:
        return seen.program(*tensors)
    if seen.is_final:
        return function(*settings, *tensors)
    recorder = Recorder(tensors)
    outputs = recorder.run(function, settings, tensors)
    _seen[key] = Seen(recorder.program(outputs), True)
    return outputs


def recorder() -> Recorder | None:
    """Who records what this thread calls, if anybody does."""
    return _active.recorder


def _may_replay(tensors: Tensors) -> bool:
    """Whether these are plain tensors of an engine that gains by it, and nobody else follows what is called."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    given = [t for t in tensors if t is not None]
    first = given[0]
    if not dispatch.choose("conv_fprop", first.device.type, first.dtype).engine.replays:
        return False
    return all(map(_is_plain, given)) and len(set(map(id, given))) == len(given)


def _is_plain(t: Tensor) -> bool:
    """Whether ``t`` is just strided memory. Views that negate are resolved by the dispatcher on the way to an op."""
    return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not (t.is_neg() or t._is_zerotensor())


def _look(t: Tensor | None) -> Hashable:
    """What of a tensor decides which kernels run on it, and how."""
    return None if t is None else (t.dtype, t.shape, t.stride(), t.get_device(), t.data_ptr() % 16)


class Recorder(TorchDispatchMode):
    """Notes every op and launch that a call makes, while it makes them."""

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self.reason: str | None = None  # why what was called cannot be called again
        self._graph = fx.Graph()
        self._nodes: MutableMapping[Tensor, fx.Node] = WeakTensorKeyDictionary()
        for i, t in enumerate(inputs):
            self._name(t, self._graph.placeholder(f"t{i}"))

    def run(self, function: Run, settings: tuple[Hashable, ...], tensors: Tensors) -> tuple[Tensor | None, ...]:
        _active.recorder = self
        try:
            with self:
                return function(*settings, *tensors)
        finally:
            _active.recorder = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ops.IMPLEMENTATIONS:  # an op of ours: not itself, but what it calls
            with self:
                result = ops.IMPLEMENTATIONS[func](*args, **kwargs)
            written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.is_write and a is not None]
            if written:
                self.note(increment_version, (written,), {})
            return result
        result = func(*args, **kwargs)
        if func is aten.new_empty.default:  # what it is like may be gone by then
            args, kwargs = (result.shape,), {"dtype": result.dtype, "device": result.device}
            func = aten.empty.memory_format
        self._name(result, self.note(func, args, kwargs))
        return result

    def paused(self) -> AbstractContextManager[None]:
        """Within this context nothing is noted, whatever is called."""
        return torch._C._DisableTorchDispatch()  # type: ignore[no-any-return]

    def note(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> fx.Node:
        """One call more."""
        return self._graph.call_function(function, map_aggregate(args, self._node), map_aggregate(kwargs, self._node))

    def _name(self, result: Any, node: fx.Node) -> None:
        """From now on ``result`` is what ``node`` computes."""
        if isinstance(result, Tensor):
            if result not in self._nodes:  # else an op in place gave back its argument
                self._nodes[result] = node
        elif isinstance(result, (tuple, list)):
            for i, part in enumerate(result):
                self._name(part, self._graph.call_function(operator.getitem, (node, i)))
        elif result is not None:
            self.reason = f"{node.target} gives {type(result).__name__}: the caller may look at its value"

    def _node(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = self._nodes.get(value)
        if node is None:
            self.reason = "a tensor is used that was neither given nor made there"
        return node

    def program(self, outputs: tuple[Tensor | None, ...]) -> Run | None:
        """What was recorded as a function of its inputs alone; None where that cannot be."""
        self._graph.output(map_aggregate(outputs, self._node))
        if self.reason is not None:
            return None
        self._graph.eliminate_dead_code(_is_impure)
        return fx.GraphModule(nn.Module(), self._graph).forward


def _is_impure(node: fx.Node) -> bool:
    """Whether a call matters though nobody uses what it returns."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op in ("placeholder", "output")
    return not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable
