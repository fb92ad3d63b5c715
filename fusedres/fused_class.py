"""The class of a converted module: that of the user, with the module's graph, chains in place, for a forward.

The modules of a chain stay where they are and are read at every call. A graph holds as long as what the forward decided
by does; after a change it is made anew. Where nothing may be replaced, or a call is not what the graph is of, the
class's own forward runs.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fusedres import chain_search, lines, tracing
from fusedres.chains import Chain, Slot, rewrite
from fusedres.formats import is_contiguous_map, is_indifferent, run_in_channels_last
from fusedres.guards import Guard, Structure, all_hold, collections_hold
from fusedres.lines import Step

#: The graphs kept for one module: training and eval, each with and without some attribute changed.
_PLANS = 4


class Plan(NamedTuple):
    """How a module's forward runs: with these chains, or (``run`` is None) as its class says. ``reasons``: for every
    conv that the module calls outside the chains; ``steps``: those that are all of its forward, if they are;
    ``refusal``: why there is no graph at all."""

    trace: tracing.Trace
    run: Callable[..., Any] | None
    chains: tuple[Chain, ...]
    reasons: dict[nn.Module, str]
    steps: tuple[Step, ...] | None = None

    @property
    def refusal(self) -> str | None:
        return self.trace.refusal


#: The plans of each module, the last used first. Copies and pickles of a module do not carry them along.
_plans: WeakKeyDictionary[nn.Module, list[Plan]] = WeakKeyDictionary()


class _Answer(NamedTuple):
    """Whether a module cares for memory formats, and what it and all ``below`` it were when that was found out."""

    below: tuple[nn.Module, ...]
    guards: tuple[Guard, ...]
    structures: tuple[Structure, ...]
    is_indifferent: bool

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing has changed, and no tensor was replaced."""
        return all_hold(self.guards, (module, *self.below)) and collections_hold(self.structures)


_answers: WeakKeyDictionary[nn.Module, _Answer] = WeakKeyDictionary()

T = TypeVar("T")


def _cached(function: Callable[[type[nn.Module]], T]) -> Callable[[type[nn.Module]], T]:
    """``functools.cache``; the type checker takes a module class's ``__hash__`` for its own."""
    return functools.cache(function)  # type: ignore[return-value]


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


def is_derived(module: nn.Module) -> bool:
    """Whether the class of ``module`` was derived from a fused one, so that its forward may be another."""
    kind = type(module)
    return isinstance(kind, _FusedType) and "original" not in vars(kind)


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
    last = _answers.get(module)
    if last is not None and last.holds(module):
        return last.is_indifferent
    parts = tuple(module.modules())
    structures = () if last is None else last.structures
    is_same = len(structures) == len(parts) and all(map(Structure.holds, structures, parts))
    answer = last.is_indifferent if last is not None and is_same else is_indifferent(module, _graph_of)
    _answers[module] = _Answer(parts[1:], tuple(map(Guard.of, parts)), tuple(map(Structure.of, parts)), answer)
    return answer


def _graph_of(module: nn.Module) -> fx.Graph | None:
    is_known = owner_reason(module) is None and not is_derived(module) and inputs(type(module))
    return plan_of(module).trace.graph if is_known else None


def _make_plan(module: nn.Module) -> Plan:
    kind = original_class(module)
    trace = tracing.trace(module, kind.forward, inputs(kind))
    if trace.graph is None:
        return Plan(trace, None, (), {})
    assert trace.result is not None
    finding = chain_search.find(trace.graph, module)
    slots = rewrite(trace.graph, finding.sites)
    steps = lines.steps(trace.graph, module, slots) if trace.result.is_leaf() else None
    if not finding.sites:
        return Plan(trace, None, (), finding.reasons, steps)
    run = _compile(*lines.with_lines(trace.graph, module, slots, _steps_of), trace.result)
    return Plan(trace, run, tuple(site.chain for site in finding.sites), finding.reasons, steps)


def _steps_of(module: nn.Module) -> tuple[tuple[Step, ...], tracing.Trace] | None:
    if not is_converted(module) or is_derived(module):
        return None
    plan = plan_of(module)
    return None if plan.steps is None else (plan.steps, plan.trace)


def _compile(graph: fx.Graph, slots: dict[Slot, Any], result: pytree.TreeSpec) -> Callable[..., Any]:
    """The graph, its slots filled, as a function of the module and its input."""
    code = graph.python_code("self")
    namespace = {name: slots[value] if isinstance(value, Slot) else value for name, value in code.globals.items()}
    exec(code.src, namespace)
    run = namespace.pop("forward")

    def run_and_build(*args: Any) -> Any:
        return pytree.tree_unflatten(run(*args), result)

    return run_and_build


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
