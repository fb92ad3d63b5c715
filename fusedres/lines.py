"""What of a converted module's graph is one call: a line of chains, one behind another, and a head.

Lines and heads are put into a copy of the graph: the graph itself shows every module and chain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusedres import functional, recall
from fusedres.blocks import chain_of
from fusedres.chains import Chain, Slot, put_slot
from fusedres.inspection import head_reason, hook_reason, may_call_convs
from fusedres.nodes import is_flatten, module_of, takes_one
from fusedres.tracing import Trace

#: What hands a map on: a chain, or a module that may run chains.
Step = Chain | nn.Module

#: Of a module that ``fuse`` converted: the steps that are all of its forward, if they are, and the trace of that.
StepsOf = Callable[[nn.Module], tuple[tuple[Step, ...], Trace] | None]


class Line:
    """Steps that follow one another, each reading nothing but the map that the one before it hands on.

    They run one by one until all chains of it are recalled; then they run at once (fusedres/recall.py).
    """

    def __init__(self, steps: tuple[Step, ...], steps_of: StepsOf) -> None:
        self._steps, self._steps_of = steps, steps_of
        self._parts = tuple(m for step in steps for m in (step.modules if isinstance(step, Chain) else (step,)))

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W). Maps that are not channels_last go step by step: each step hands on the format it meets."""
        if not (isinstance(x, Tensor) and x.is_contiguous(memory_format=torch.channels_last)):
            return self._run(x)
        return recall.network(self, self._parts, x, self._run, self._course)

    def _run(self, x: Tensor) -> Tensor:
        for step in self._steps:
            x = step(x)
        return x

    def _course(self) -> recall.Course | None:
        chains: list[recall.Modules] = []
        traces: list[Trace] = []
        if not all(self._follow(step, chains, traces) for step in self._steps):
            return None
        return recall.Course(chains, lambda: all(map(Trace.holds_beside_modules, traces)))

    def _follow(self, step: Step, chains: list[recall.Modules], traces: list[Trace]) -> bool:
        """Whether ``step`` runs nothing but chains; they and the traces that say so are added to the lists."""
        if isinstance(step, Chain):
            chains.append(step.modules)
            return True
        if hook_reason(step) is not None:
            return False
        if type(step) is nn.Sequential:
            return all(self._follow(child, chains, traces) for child in step.children())
        if (of_block := chain_of(step)) is not None:
            chains.append(of_block)
            return True
        found = self._steps_of(step)
        if found is None:
            return False
        steps, trace = found
        traces.append(trace)
        return all(self._follow(child, chains, traces) for child in steps)


class Head:
    """A global average pool, its flattening (``torch.flatten`` where no module does it) and the last layer."""

    def __init__(self, avgpool: nn.Module, flatten: nn.Module | None, fc: nn.Linear) -> None:
        self._avgpool, self._flatten, self._fc = avgpool, flatten, fc

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) -> (N, F)."""
        y = None
        if self._flatten is None or hook_reason(self._flatten) is None:
            y = functional.head(x, self._avgpool, self._fc)
        if y is not None:
            return y
        means = self._avgpool(x)
        return self._fc(torch.flatten(means, 1) if self._flatten is None else self._flatten(means))


def with_lines(
    graph: fx.Graph, owner: nn.Module, slots: dict[Slot, Chain], steps_of: StepsOf
) -> tuple[fx.Graph, dict[Slot, Any]]:
    """A copy of the graph with its lines and heads as calls of slots, and what belongs into each slot."""
    graph = copy.deepcopy(graph)
    filled: dict[Slot, Any] = dict(slots)

    def put(part: Line | Head, nodes: list[fx.Node]) -> None:
        slot = Slot()
        filled[slot] = part
        put_slot(graph, slot, nodes, nodes[0].args[:1])

    known = {node: step for node in graph.nodes if (step := _step(node, owner, slots)) is not None}
    for nodes in _in_a_row(known):
        line = tuple(known[node] for node in nodes)
        if len(line) > 1 or isinstance(line[0], nn.Module):
            put(Line(line, steps_of), nodes)
    for node in list(graph.nodes):
        if (found := _head(node, owner)) is not None:
            put(*found)
    return graph, filled


def steps(graph: fx.Graph, owner: nn.Module, slots: dict[Slot, Chain]) -> tuple[Step, ...] | None:
    """The steps that are all of the graph, from its one input to its one result; None if it is more than that."""
    first, *nodes, last = graph.nodes
    found = tuple(step for node in nodes if (step := _step(node, owner, slots)) is not None)
    is_one_row = first.op == "placeholder" and len(_in_a_row([first, *nodes, last])) == 1
    return found if is_one_row and len(found) == len(nodes) else None


def _step(node: fx.Node, owner: nn.Module, slots: dict[Slot, Chain]) -> Step | None:
    """The chain or module that ``node`` calls on one tensor, if it may be a step."""
    if not takes_one(node):
        return None
    if (module := module_of(node, owner)) is not None:
        return module if may_call_convs(module) else None
    chain = slots.get(node.target) if isinstance(node.target, Slot) else None
    return chain if chain is not None and chain.is_closed else None


def _in_a_row(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """``nodes`` in groups of which each node alone reads the one before it, and nothing else happens between."""
    groups: list[list[fx.Node]] = []
    for node in nodes:
        former = groups[-1][-1] if groups else None
        if former is not None and node.prev is former and list(former.users) == [node]:
            groups[-1].append(node)
        else:
            groups.append([node])
    return groups


def _head(node: fx.Node, owner: nn.Module) -> tuple[Head, list[fx.Node]] | None:
    """The head that begins at ``node``, and its nodes."""
    nodes = [node, node.next, node.next.next]
    avgpool, flatten, fc = (module_of(n, owner) for n in nodes)
    if avgpool is None or not isinstance(fc, nn.Linear) or head_reason(avgpool, fc) is not None:
        return None
    is_called = takes_one(nodes[0]) and is_flatten(nodes[1], owner) and takes_one(nodes[2])
    return (Head(avgpool, flatten, fc), nodes) if is_called and len(_in_a_row(nodes)) == 1 else None
