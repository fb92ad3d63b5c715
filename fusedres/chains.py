"""A chain of conv, BN, shortcut add and ReLU as one call, and how it takes the place of its nodes in a graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedres import autocast
from fusedres.functional import ConvBN, ShortcutShapeError, leaving, residual_chain, stem
from fusedres.recall import Modules, modules_of


@dataclass(frozen=True)
class Chain:
    """Modules that run as one: ``pairs``, an added shortcut, a ReLU; ``activations`` are the ReLU modules replaced.

    The shortcut is a ``projection``, or the chain's own input where it ``is_identity``, or else a tensor given. An add
    in place keeps the dtype and shape of the branch. A ``pool`` may follow one conv, its BN and ReLU.
    """

    pairs: tuple[ConvBN, ...]
    projection: ConvBN | None
    adds: bool
    is_identity: bool
    relu: bool
    activations: tuple[nn.Module | None, ...]
    adds_in_place: bool = False
    pool: nn.Module | None = None

    @property
    def convs(self) -> list[nn.Conv2d]:
        """Every conv in it, the projection's last."""
        return [pair.conv for pair in (*self.pairs, *([self.projection] if self.projection else []))]

    @property
    def modules(self) -> Modules:
        """Every module in it, as ``fusedres.recall`` orders them."""
        return modules_of(self.pairs, self.projection, [m for m in (*self.activations, self.pool) if m is not None])

    @property
    def is_closed(self) -> bool:
        """Whether it reads nothing but its input."""
        return not self.adds or self.projection is not None or self.is_identity

    def __call__(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); ``given``: the tensor to add, where the shortcut is neither projection nor identity."""
        if self.pool is not None:
            (pair,), (relu,) = self.pairs, self.activations
            return leaving(stem(x, *pair, relu, self.pool), x)
        shortcut = self.projection or (x if self.is_identity else given)
        modules = [module for module in self.activations if module is not None]
        if isinstance(shortcut, Tensor) and shortcut.dtype != autocast.compute_dtype(x):
            return self._unfused(x, given)  # their sum has another dtype than the conv
        if self.adds and not isinstance(shortcut, (Tensor, ConvBN)):
            return self._unfused(x, given)
        try:
            return residual_chain(
                x, self.pairs, shortcut, self.relu, "standard", lambda x: self._unfused(x, given), modules
            )
        except ShortcutShapeError:
            return self._unfused(x, given)

    def _unfused(self, x: Tensor, given: Tensor | None) -> Tensor:
        y = x
        for i, (conv, bn) in enumerate(self.pairs):
            y = bn(conv(y))
            if i < len(self.pairs) - 1:
                y = self._activated(y, i)
        add = operator.iadd if self.adds_in_place else operator.add
        if self.projection is not None:
            y = add(y, self.projection.bn(self.projection.conv(x)))
        elif self.adds:
            y = add(y, x if self.is_identity else given)
        return self._activated(y, -1) if self.relu else y

    def _activated(self, y: Tensor, i: int) -> Tensor:
        module = self.activations[i]
        return F.relu(y) if module is None else module(y)

    def __str__(self) -> str:
        count = f"{len(self.pairs)} x " if len(self.pairs) > 1 else ""
        shortcut = "projection" if self.projection else "input" if self.is_identity else "tensor"
        added, relu, pool = f" + {shortcut}" if self.adds else "", ", ReLU" if self.relu else "", ", max-pool"
        return f"{count}conv-BN{added}{relu}{pool if self.pool is not None else ''}"


@dataclass(frozen=True)
class Site:
    """A chain and its place in the graph: it replaces ``nodes``, of which the last is its output, and reads these."""

    chain: Chain
    nodes: tuple[fx.Node, ...]
    x: fx.Node
    given: Any = None


class Slot:
    """What a graph calls where a chain is to be. Graphs are cycles: modules in one would outlive their model."""

    __name__ = "fused_chain"

    def __call__(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        raise NotImplementedError("no chain was put into this place")


def put_slot(graph: fx.Graph, slot: Slot, nodes: Sequence[fx.Node], reads: Sequence[Any]) -> fx.Node:
    """The call of ``slot`` with what it ``reads``, in place of ``nodes``, whose last gave what it gives."""
    with graph.inserting_before(nodes[-1]):
        call = graph.call_function(slot, tuple(reads))
    nodes[-1].replace_all_uses_with(call)
    for node in sorted(nodes, reverse=True):
        graph.erase_node(node)
    return call


def rewrite(graph: fx.Graph, sites: Iterable[Site]) -> dict[Slot, Chain]:
    """Put a slot in place of the nodes of each chain; which chain belongs into which."""
    slots: dict[Slot, Chain] = {}
    outputs: dict[fx.Node, fx.Node] = {}
    for site in sorted(sites, key=lambda site: site.nodes[-1]):
        slot = Slot()
        slots[slot] = site.chain
        reads = [site.x] if site.given is None else [site.x, site.given]
        outputs[site.nodes[-1]] = put_slot(graph, slot, site.nodes, [outputs.get(node, node) for node in reads])
    return slots
