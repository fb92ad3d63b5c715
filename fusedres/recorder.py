"""A call recorded: which ops and launches a function of tensors makes, as a program that makes them again.

A program is a ``torch.fx`` graph compiled to a function. What only launches read and write needs no tensor made for it:
a launch takes addresses, each some bytes behind the start of a *root*, the tensor that was given or made there and of
which others are views. So views for launches cost nothing, any other view is one ``as_strided`` of its root, and the
small tensors that launches hand to one another share an allocation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import increment_version
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fusedres import launches, ops
from fusedres.launches import Launch, Place

aten = torch.ops.aten

Tensors = Sequence[Tensor | None]
Outputs = tuple[Tensor | None, ...]
Program = Callable[..., Outputs]

_EMPTY = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default)
#: Tensors up to this size share an allocation, which lives as long as the call; larger ones go as soon as they can.
_SMALL_BYTES = 4 << 20
_ALIGNMENT = 256  # bytes


class Known(NamedTuple):
    """What a tensor is in the program: the value of a node, and of which root."""

    node: fx.Node
    root: fx.Node
    root_address: int
    root_dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Notes every op and launch that a call makes, while it makes them."""

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self.reason: str | None = None  # why what was called cannot be called again
        self._graph = fx.Graph()
        self._known: MutableMapping[Tensor, Known] = WeakTensorKeyDictionary()
        self._views: dict[tuple[Any, ...], fx.Node] = {}
        self._launches: dict[fx.Node, Launch] = {}
        self._bytes: dict[fx.Node, int] = {}  # of what was made empty
        self._effects: set[fx.Node] = set()  # calls that matter, whatever they return
        self._written: list[fx.Node] = []  # by ops of ours, unseen by autograd
        self._device = next(t.device for t in inputs if t is not None)
        for i, t in enumerate(inputs):
            node = self._graph.placeholder(f"t{i}")
            if t is not None:
                self._know(t, node, ())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.reason is not None:
            return func(*args, **kwargs)
        if func in ops.IMPLEMENTATIONS:  # an op of ours: not itself, but what it calls
            with self:
                result = ops.IMPLEMENTATIONS[func](*args, **kwargs)
            written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.is_write and a is not None]
            self._written.extend(map(self._node, written))
            return result
        result = func(*args, **kwargs)
        if func in _EMPTY:
            self._know(result, self._empty(result), ())
            return result
        node = self._call(func, args, kwargs)
        if _is_tensor(result) and result in self._known:  # an argument given back: in place, or waited for
            self._effects.add(node)
        elif self.reason is None:
            self._know(result, node, [t for t in tree_leaves((args, kwargs)) if _is_tensor(t)])
        return result

    def paused(self) -> AbstractContextManager[None]:
        """Within this context nothing is noted, whatever is called."""
        return torch._C._DisableTorchDispatch()

    def launch(self, launch: Launch, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """Note ``launch``, with each tensor among its arguments and at which place it stands."""
        roots = []
        for i, t in tensors:
            known = self._look_up(t)
            if known is None:
                return
            roots.append(known.root)
            launch.places.append(Place(i, t.data_ptr() - known.root_address, t.dtype, t.shape, t.stride()))
        node = self._graph.call_function(launch.bound, tuple(roots), name="launch")  # bound where all is known
        self._launches[node] = launch

    def program(self, outputs: Outputs) -> Program | None:
        """What was recorded as a function of its inputs alone; None where that cannot be."""
        if self._written:
            self._graph.call_function(increment_version, (self._written,))
        self._graph.output(map_aggregate(outputs, self._node))
        if self.reason is not None:
            return None
        self._graph.eliminate_dead_code(self._is_impure)
        self._share_allocation()
        self._bind_launches()
        return fx.GraphModule(nn.Module(), self._graph).forward

    def _call(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> fx.Node:
        return self._graph.call_function(function, map_aggregate(args, self._node), map_aggregate(kwargs, self._node))

    def _empty(self, t: Tensor) -> fx.Node:
        options: dict[str, Any] = {"dtype": t.dtype, "device": t.device}
        node = self._graph.call_function(torch.empty_strided, (tuple(t.shape), t.stride()), options)
        self._bytes[node] = t.untyped_storage().nbytes()
        return node

    def _know(self, result: Any, node: fx.Node, args: Sequence[Tensor]) -> None:
        """From now on ``result`` is what ``node`` computes of ``args``."""
        if isinstance(result, Tensor):
            if result.layout is not torch.strided:
                self.reason = f"{node.target} gives a tensor without strides"
                return
            storage = result.untyped_storage()._cdata
            base = next((self._known[t] for t in args if t.untyped_storage()._cdata == storage), None)
            if base is None:
                self._known[result] = Known(node, node, result.data_ptr(), result.dtype)
            else:
                viewed = self._view(result, base.root) if result.dtype == base.root_dtype else node
                self._known[result] = base._replace(node=viewed)
        elif isinstance(result, (tuple, list)):
            for i, part in enumerate(result):
                self._know(part, self._graph.call_function(operator.getitem, (node, i)), args)
        elif result is not None:
            self.reason = f"{node.target} gives {type(result).__name__}: the caller may look at its value"

    def _view(self, t: Tensor, root: fx.Node) -> fx.Node:
        """``t`` as a view of its root. Where that begins in its storage is the same at every call."""
        args = root, tuple(t.shape), t.stride(), t.storage_offset()
        if args not in self._views:
            self._views[args] = self._graph.call_function(torch.as_strided, args)
        return self._views[args]

    def _look_up(self, t: Tensor) -> Known | None:
        known = self._known.get(t)
        if known is None:
            self.reason = "a tensor is used that was neither given nor made there"
        return known

    def _node(self, value: Any) -> Any:
        if not _is_tensor(value):
            return value
        known = self._look_up(value)
        return known and known.node

    def _is_impure(self, node: fx.Node) -> bool:
        """Whether a call matters though nobody uses what it returns."""
        if node.op != "call_function":
            return True
        is_mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        return is_mutable or node.target is increment_version or node in self._launches or node in self._effects

    def _share_allocation(self) -> None:
        """One allocation for all small tensors that nobody but launches use."""
        total, offsets = 0, {}
        for node, size in self._bytes.items():
            if size <= _SMALL_BYTES and node.users and all(user in self._launches for user in node.users):
                offsets[node] = total
                total += -(-size // _ALIGNMENT) * _ALIGNMENT
        if not offsets:
            return
        with self._graph.inserting_before(next(node for node in self._graph.nodes if node.op != "placeholder")):
            shared = self._graph.call_function(
                torch.empty_strided, ((total,), (1,)), {"dtype": torch.uint8, "device": self._device}
            )
        for node, offset in offsets.items():
            for user in list(node.users):
                places = self._launches[user].places
                for i, root in enumerate(user.args):
                    if root is node:
                        places[i] = places[i]._replace(offset=places[i].offset + offset)
                user.replace_input_with(node, shared)
            self._graph.erase_node(node)

    def _bind_launches(self) -> None:
        """Make every list of native launches with nothing computed in between one call, any other launch its own."""
        together: list[fx.Node] = []
        for node in list(self._graph.nodes):
            launch = self._launches.get(node)
            if launch is not None and launch.is_native:
                together.append(node)
            elif launch is not None or node.target not in (torch.empty_strided, torch.as_strided):
                self._bind(together)
                together = []
            if launch is not None and not launch.is_native:
                node.target = launch.bound()

    def _bind(self, nodes: list[fx.Node]) -> None:
        """One call for these launches, where the last of them is."""
        if not nodes:
            return
        roots = list(dict.fromkeys(root for node in nodes for root in node.args))
        places = [[roots.index(root) for root in node.args] for node in nodes]
        function = launches.bound([self._launches[node] for node in nodes], places, len(roots), self._device.index)
        with self._graph.inserting_before(nodes[-1]):
            self._graph.call_function(function, tuple(roots), name="launch")
        for node in nodes:
            self._graph.erase_node(node)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
