"""``fuse``: an eager model whose conv-BN(-add)-ReLU chains run fused, its modules, state and classes as they were.

Every module that calls convs itself gets a subclass of its class, made here, with another forward: that of the module's
graph with its chains in place. The modules of a chain stay where they are and are read at every call. The graph holds
as long as what the forward decided by does; after a change it is made anew, and where nothing may be replaced, or the
graph does not say what a call does, the class's own forward runs.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fusedres import chains, tracing
from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.chains import Chain
from fusedres.formats import is_contiguous_map, is_indifferent, run_in_channels_last
from fusedres.functional import ConvBN, chain_reason
from fusedres.guards import Structure
from fusedres.inspection import checked_module
from fusedres.layers import FusedConvBNReLU
from fusedres.resnet import StagedNet

#: The graphs kept for one module: training and eval, each with and without some attribute changed.
_PLANS = 4


class NotFusedError(RuntimeError):
    """Convolutions that ``fuse(strict=True)`` could not fuse."""


class Plan(NamedTuple):
    """How a module's forward runs: with these chains, or (``run`` is None) as its class says. ``reasons``: for every
    conv that the module calls outside the chains; ``refusal``: why there is no graph at all."""

    trace: tracing.Trace
    run: Callable[..., Any] | None
    chains: tuple[Chain, ...]
    reasons: dict[nn.Module, str]

    @property
    def refusal(self) -> str | None:
        return self.trace.refusal


#: The plans of each module, the last used first. Copies and pickles of a module do not carry them along.
_plans: WeakKeyDictionary[nn.Module, list[Plan]] = WeakKeyDictionary()


T = TypeVar("T")


def _cached(function: Callable[[type[nn.Module]], T]) -> Callable[[type[nn.Module]], T]:
    """``functools.cache``; the type checker takes a module class's ``__hash__`` for its own."""
    return functools.cache(function)  # type: ignore[return-value]


#: Whether a module cares for memory formats, and what all its parts were when that was found out.
_indifferent: WeakKeyDictionary[nn.Module, tuple[tuple[Structure, ...], bool]] = WeakKeyDictionary()


class _FusedType(type):
    """The class of the classes made here. They are pickled as the class that they were made from."""

    original: type[nn.Module]


@_cached
def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` with the same name whose forward runs the chains of its graph."""
    count = inputs(original)

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        is_plain = len(args) == count and not kwargs and all(type(arg) is Tensor for arg in args)
        if not is_plain or tracing.is_recorded() or "_is_replica" in self.__dict__:
            return original.forward(self, *args, **kwargs)
        run = plan_of(self).run or original.forward
        if any(map(is_contiguous_map, args)) and _is_indifferent(self):
            return run_in_channels_last(run, self, args)
        return run(self, *args)

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    kind: Any = _FusedType(original.__name__, (original,), {**names, "forward": forward, "original": original})
    return kind


def _reduce_class(kind: Any) -> str | tuple[Any, ...]:
    """How to pickle a class made here; one that others derived from it goes by its name, as any class does."""
    return (fused_class, (kind.original,)) if "original" in vars(kind) else kind.__qualname__


copyreg.pickle(_FusedType, _reduce_class)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before it was fused."""
    kind: Any = type(module)
    return kind.original if isinstance(kind, _FusedType) else kind


def is_converted(module: nn.Module) -> bool:
    """Whether ``fuse`` gave ``module`` its forward."""
    return isinstance(type(module), _FusedType)


@_cached
def inputs(kind: type[nn.Module]) -> int:
    """How many arguments without a default the forward of ``kind`` has."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def plan_of(module: nn.Module) -> Plan:
    """The plan of ``module`` as it is now."""
    plans = _plans.setdefault(module, [])
    for i, plan in enumerate(plans):
        if plan.trace.holds(module):
            if i:
                plans.insert(0, plans.pop(i))
            return plan
    plan = _make_plan(module)
    plans.insert(0, plan)
    del plans[_PLANS:]
    return plan


def _is_indifferent(module: nn.Module) -> bool:
    """Whether ``module`` as it is now does not care for the memory format of its input."""
    parts = list(module.modules())
    structures, answer = _indifferent.get(module, ((), False))
    if len(structures) != len(parts) or not all(map(Structure.holds, structures, parts)):
        answer = is_indifferent(module, _graph_of)
        _indifferent[module] = tuple(map(Structure.of, parts)), answer
    return answer


def _graph_of(module: nn.Module) -> fx.Graph | None:
    return plan_of(module).trace.graph if owner_reason(module) is None and inputs(type(module)) else None


def _make_plan(module: nn.Module) -> Plan:
    kind = original_class(module)
    trace = tracing.trace(module, kind.forward, inputs(kind))
    if trace.graph is None:
        return Plan(trace, None, (), {})
    finding = chains.find(trace.graph, module)
    if not finding.sites:
        return Plan(trace, None, (), finding.reasons)
    chains.rewrite(trace.graph, finding.sites)
    return Plan(trace, _compile(trace), tuple(site.chain for site in finding.sites), finding.reasons)


def _compile(trace: tracing.Trace) -> Callable[..., Any]:
    """The graph as a function of the module and its input."""
    assert trace.graph is not None
    assert trace.result is not None
    code = trace.graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    run, result = namespace["forward"], trace.result

    def run_and_build(*args: Any) -> Any:
        return pytree.tree_unflatten(run(*args), result)

    return run_and_build


def fuse(model: nn.Module, *, inplace: bool = False, strict: bool = False) -> nn.Module:
    """``model`` with its conv-BN(-add)-ReLU chains fused: a copy, or with ``inplace`` the model itself.

    Modules, state_dict, parameters and hooks are as before, and so are the numbers, in training and in eval. What
    cannot be fused runs as it did; ``fusedres.explain`` says why. TypeError where ``model`` is no module;
    with ``strict``, NotFusedError where a convolution stays unfused.
    """
    model = checked_module(model) if inplace else copy.deepcopy(checked_module(model))
    seen: set[nn.Module] = set()
    converted = [module for module in model.modules() if _fuses_more(module, seen)]
    converted += [module for module in model.modules() if module not in converted and _leads_to(module, converted)]
    former = {module: type(module) for module in converted}
    for module in converted:
        module.__class__ = fused_class(original_class(module))
    if strict and (unfused := unfused_convs(model)):
        for module, kind in former.items():
            module.__class__ = kind
        lines = (f"\n  {name}: {reason}" for name, reason in unfused.items())
        raise NotFusedError(f"{len(unfused)} convolutions stay unfused:{''.join(lines)}")
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """What ``fuse`` was given, with the state that ``model`` has now: a copy, or with ``inplace`` the model itself."""
    model = checked_module(model) if inplace else copy.deepcopy(checked_module(model))
    for module in filter(is_converted, model.modules()):
        if "original" not in vars(type(module)):
            raise RuntimeError(f"{type(module).__name__} was derived from a fused class; undo that first")
        module.__class__ = original_class(module)
    return model


def _fuses_more(module: nn.Module, seen: set[nn.Module]) -> bool:
    """Whether ``module`` fuses convs, in training or in eval, that are not ``seen`` yet; they are then."""
    if not _may_call_convs(module) or owner_reason(module) is not None:
        return False
    convs = {conv for plan in _plans_of_modes(module) for chain in plan.chains for conv in chain.convs}
    fuses_more = not convs <= seen
    seen |= convs
    return fuses_more


def _leads_to(module: nn.Module, converted: list[nn.Module]) -> bool:
    """Whether ``module`` calls any of ``converted``, and may so hand on maps in the format that they work in."""
    is_caller = _may_call_convs(module) and owner_reason(module) is None
    return is_caller and plan_of(module).refusal is None and not set(converted).isdisjoint(module.modules())


def _plans_of_modes(module: nn.Module) -> Iterator[Plan]:
    """The plan of ``module`` in the mode that it is in, and in the other one."""
    yield plan_of(module)
    training = module.training
    try:
        module.training = not training
        yield plan_of(module)
    finally:
        module.training = training


def owner_reason(module: nn.Module) -> str | None:
    """Why the forward of ``module`` may not be replaced, or None."""
    kind = original_class(module)
    if kind.__module__.partition(".")[0] == "fusedres":
        return "it is fused by itself"
    if type(kind) is not type:
        return f"the class {kind.__name__} has a metaclass"
    if any("__init_subclass__" in vars(base) for base in kind.__mro__[:-1]):
        return f"the class {kind.__name__} wants to know of its subclasses"
    if "forward" in module.__dict__:
        return f"the forward of a {kind.__name__} was replaced"
    return None


def _may_call_convs(module: nn.Module) -> bool:
    """Whether there is a conv below ``module``, and a forward that could call it."""
    has_forward = type(module).forward is not nn.Module.forward
    return has_forward and any(isinstance(m, nn.Conv2d) for m in module.modules() if m is not module)


def unfused_convs(model: nn.Module) -> dict[str, str]:
    """The reason for every conv of ``model`` that runs unfused, by name."""
    fused: set[nn.Module] = set()
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():  # callers come before what they call, whose reasons are closer
        if isinstance(module, (FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, StagedNet)):
            chain, reason = built_in_chain(module), built_in_reason(module)
            fused.update(chain.convs if reason is None else ())
            reasons.update(dict.fromkeys(chain.convs if reason is not None else (), str(reason)))
        elif _may_call_convs(module):
            below = [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
            reason = owner_reason(module)
            plan = plan_of(module) if reason is None else None
            if plan is None or plan.refusal is not None:
                reasons.update(dict.fromkeys(below, str(plan.refusal if plan else reason)))
                continue
            reasons.update(plan.reasons)
            convs = [conv for chain in plan.chains for conv in chain.convs]
            if is_converted(module):
                fused.update(convs)
            else:
                reasons.update(dict.fromkeys(convs, "fusedres.fuse has not converted it"))
    return {
        name: reasons.get(conv, "no forward that could be traced calls it")
        for name, conv in model.named_modules()
        if isinstance(conv, nn.Conv2d) and conv not in fused
    }


BuiltIn = FusedBasicBlock | FusedBottleneck | FusedConvBNReLU | StagedNet


def built_in_chain(module: BuiltIn) -> Chain:
    """What a module of ours fuses by itself; of a network, its stem."""
    if isinstance(module, StagedNet):
        return Chain((ConvBN(module.conv1, module.bn1),), None, False, False, True, (module.relu,))
    if isinstance(module, FusedConvBNReLU):
        return Chain(tuple(module.pairs), None, False, False, isinstance(module.relu, nn.ReLU), (module.relu,))
    activations = (module.relu,) * module.depth
    return Chain(tuple(module.pairs), module.projection, True, module.downsample is None, True, activations)


def built_in_reason(module: BuiltIn) -> str | None:
    """Why it runs its modules one by one, or None."""
    if isinstance(module, StagedNet):
        return chain_reason([ConvBN(module.conv1, module.bn1)], [module.relu])
    return module.reason()
