"""A module's forward as a graph: which modules and functions it calls, on what; and whether that is all that it does.

``torch.fx`` runs the forward once, on stand-ins for tensors. Whatever a graph could not hold is refused with a reason:
choices by values, by the clock or by chance, contexts, side effects. What the forward did decide by, the attributes of
modules and constants, is kept beside the graph, so that a change of it is seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.frames import CONSTANTS, Constant, Frames
from fusedres.guards import Structure, collections_hold
from fusedres.inspection import has_global_hooks, is_batch_norm, is_traced, is_transformed, plain_reason
from fusedres.nodes import AUGMENTED
from fusedres.norm_act import is_norm_act

_lock = threading.RLock()  # torch.fx patches nn.Module while it traces


class Refusal(Exception):
    """Why there is no graph."""


class Trace(NamedTuple):
    """What a forward does (``graph`` and the structure of its result, or the ``refusal``), and what it decided by:
    the module's ``own`` structure, and that of others below it. The module itself is not kept alive."""

    graph: fx.Graph | None
    result: pytree.TreeSpec | None
    refusal: str | None
    own: Structure
    structures: tuple[tuple[nn.Module, Structure], ...]
    constants: tuple[Constant, ...]

    def holds(self, owner: nn.Module) -> bool:
        """Whether the forward of ``owner`` would decide now as it did then."""
        if not self.own.holds(owner):
            return False
        for module, then in self.structures:
            if not then.holds(module):
                return False
        return all(map(Constant.holds, self.constants))

    def holds_beside_modules(self) -> bool:
        """``holds``, where guards of the owner and all modules below it do (fusedres/guards.py)."""
        structures = self.own, *(then for _, then in self.structures)
        return collections_hold(structures) and all(map(Constant.holds, self.constants))


def trace(owner: nn.Module, forward: Callable[..., Any], inputs: int) -> Trace:
    """``forward(owner, *tensors)`` for that many tensors. Its other parameters have their defaults."""
    with _lock:
        before = [(module, Structure.of(module)) for module in owner.modules()]
        tracer = _Tracer(forward, inputs)
        frames = Frames()
        graph = refusal = None
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled()), frames.watched(), _NoTensors(tracer):
                graph = tracer.trace(owner)
        except Exception as error:
            refusal = tracer.refusal or _first_line(error)
        if any(not then.holds(module) for module, then in before):
            refusal = "its forward changes the module"
            for _, then in before:
                then.restore()
        frames.look_at_classes(tracer.relied)
        refusal = frames.refusal or tracer.refusal or refusal
        others = tuple((module, Structure.of(module)) for module in tracer.relied if module is not owner)
        graph = None if refusal else graph
        return Trace(graph, tracer.result, refusal, Structure.of(owner), others, tuple(frames.constants))


def _first_line(error: Exception) -> str:
    if isinstance(error, Refusal):
        return str(error)
    lines = str(error).splitlines() or [type(error).__name__]
    return f"its forward cannot be traced: {lines[0]}"


def joins(module: nn.Module) -> bool:
    """Whether the calls inside ``module`` are seen as its caller's: a plain Sequential that ends in a conv or a norm.

    What follows there, in the caller, may be fused with that end.
    """
    if plain_reason(module, nn.Sequential) is not None or not len(module._modules):
        return False
    last = list(module.children())[-1]
    return type(last) is nn.Conv2d or is_batch_norm(last) or is_norm_act(last)


class _StandIn(fx.Proxy):
    """A stand-in for a tensor that records ``a += b`` as writing into ``a``; fx's own take it for ``a = a + b``."""


def _augmented(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda a, b: a.tracer.create_proxy("call_function", function, (a, b), {})


for _name, _function in AUGMENTED.items():
    setattr(_StandIn, f"__{_name}__", _augmented(_function))


class _Tracer(fx.Tracer):
    """Records the calls of submodules without looking into them, apart from those that ``joins``."""

    def __init__(self, forward: Callable[..., Any], inputs: int) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]  # annotated as a tuple of just one
        self.proxy_buffer_attributes = True
        self.refusal: str | None = None
        self.result: pytree.TreeSpec | None = None
        self.relied: dict[nn.Module, None] = {}
        self._forward, self._inputs = forward, inputs
        self._thread = threading.get_ident()

    def _rely_on(self, module: nn.Module) -> None:
        self.relied.update(dict.fromkeys((module, *module.children())))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def refuse(self, reason: str) -> Refusal:
        """The reason is kept, for a forward may catch what is raised."""
        self.refusal = self.refusal or reason
        return Refusal(reason)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        self._rely_on(self.root)
        names = [f"input_{i}" for i in range(self._inputs)]

        def run(*args: Any) -> Any:
            leaves, self.result = pytree.tree_flatten(self._forward(self.root, *args))
            if not all(isinstance(leaf, (fx.Proxy, *CONSTANTS)) for leaf in leaves):
                raise self.refuse("its forward returns something other than tensors")
            return leaves

        return run, [self.create_proxy("placeholder", name, (), {}) for name in names]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if joins(m):
            self._rely_on(m)
            return False
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if is_norm_act(m):
            self._rely_on(m)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        if isinstance(attr_val, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            self._rely_on(attr_val)
        elif isinstance(attr_val, nn.Module):
            self.relied[attr_val] = None
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            raise self.refuse("its forward reads a tensor that is neither a parameter nor a buffer")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.refuse("its forward chooses by the value of a tensor")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise self.refuse("its forward iterates over its input, or over a tensor")


class _NoTensors(TorchDispatchMode):
    """Refuses to compute: stand-ins are no tensors, so what arrives here would be the same tensor in every call."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise self._tracer.refuse(f"its forward makes a tensor of its own ({func._schema.name})")


def is_recorded() -> bool:
    """Whether what is called now is recorded, transformed or looked at call by call; nothing may be replaced then."""
    return torch.compiler.is_compiling() or is_traced() or has_global_hooks() or is_transformed()
