"""Where in a graph conv, BN, shortcut add and ReLU follow one another, and nobody else reads what is between.

A chain runs where its last node stood. So nothing between its first and its last node may write into what it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fusedres.chains import Chain, Site
from fusedres.functional import ConvBN
from fusedres.inspection import batch_norm_reason, conv_reason, is_batch_norm, plain_reason, pool_reason
from fusedres.nodes import called, is_add, is_in_place, is_pure, is_relu_call, is_relu_module, module_of, takes_one
from fusedres.norm_act import is_norm_act, norm_act_reason, norm_of


@dataclass(frozen=True)
class _Unit:
    """A conv and BN, and what follows them: an add of ``other``, a ReLU. ``end`` is the last node."""

    pair: ConvBN
    nodes: tuple[fx.Node, ...]
    other: Any = None
    adds: bool = False
    adds_in_place: bool = False
    relu: bool = False
    activation: nn.Module | None = None

    @property
    def x(self) -> fx.Node:
        return self.nodes[0].args[0]  # type: ignore[return-value]  # what a conv is called with is a node

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


@dataclass
class Finding:
    """What was found in a graph: chains, and for every conv outside them the reason."""

    sites: list[Site] = field(default_factory=list)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


class _Refused(Exception):
    """Why a conv belongs to no chain."""


def find(graph: fx.Graph, owner: nn.Module) -> Finding:
    """Every chain in the graph of ``owner``."""
    return _Search(graph, owner).run()


class _Search:
    def __init__(self, graph: fx.Graph, owner: nn.Module) -> None:
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._modules = {node: module for node in graph.nodes if (module := module_of(node, owner)) is not None}
        called = list(self._modules.values())
        self._repeated = {module for module in called if called.count(module) > 1}

    def run(self) -> Finding:
        finding = Finding()
        units: dict[fx.Node, _Unit] = {}
        for node, module in self._modules.items():
            if not isinstance(module, nn.Conv2d):
                continue
            try:
                unit = self._unit(node, module)
                units[unit.end] = unit
            except _Refused as refused:
                finding.reasons[module] = str(refused)
        for run in self._runs(self._with_adds(units)):
            finding.sites.append(self._site(run))
        self._absorb_projections(finding)
        finding.sites = list(map(self._with_pool, finding.sites))
        return finding

    def _unit(self, node: fx.Node, conv: nn.Conv2d) -> _Unit:
        """The conv at ``node`` and its BN."""
        reason = conv_reason(conv) or self._call_reason(node)
        if reason is not None:
            raise _Refused(reason)
        nodes = self._past_identities([node])
        user = self._sole_user(nodes[-1])
        bn = self._modules.get(user)
        if not self._is_still(node, user, []):
            raise _Refused(f"its input may be written to before {called(user)} reads its output")
        if bn is not None and is_norm_act(bn):
            return self._norm_act_unit(conv, bn, (*nodes, user))
        if bn is None or not (is_batch_norm(bn) or isinstance(bn, nn.modules.batchnorm._BatchNorm)):
            name = called(user) if bn is None else type(bn).__name__
            raise _Refused(f"{name} follows it, not a BN")
        reason = batch_norm_reason(bn) or self._call_reason(user)
        if reason is not None:
            raise _Refused(reason)
        return _Unit(ConvBN(conv, bn), (*nodes, user))

    def _norm_act_unit(self, conv: nn.Conv2d, norm: nn.Module, nodes: tuple[fx.Node, ...]) -> _Unit:
        """The conv and a BN with an activation of its own."""
        reason = norm_act_reason(norm) or self._call_reason(nodes[-1])
        if reason is not None:
            raise _Refused(reason)
        activation = norm.act if type(norm.act) is nn.ReLU else None
        pair = ConvBN(conv, norm_of(norm))
        return _Unit(pair, self._past_identities(nodes), relu=activation is not None, activation=activation)

    def _call_reason(self, node: fx.Node) -> str | None:
        module = self._modules[node]
        if module in self._repeated:
            return f"the same {type(module).__name__} is called more than once"
        if not takes_one(node):
            return f"a {type(module).__name__} is called with more than one tensor"
        return None

    def _sole_user(self, node: fx.Node) -> fx.Node:
        """Who reads ``node``, if nobody else does."""
        users = list(node.users)
        if len(users) != 1:
            raise _Refused(f"its output is read {len(users)} times")
        if users[0].op == "output":
            raise _Refused("its output is returned as it is")
        return users[0]

    def _past_identities(self, nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """``nodes`` and every Identity that follows them and alone reads them."""
        nodes = list(nodes)
        while len(nodes[-1].users) == 1:
            (user,) = nodes[-1].users
            module = self._modules.get(user)
            if module is None or plain_reason(module, nn.Identity) is not None or user.args != (nodes[-1],):
                break
            nodes.append(user)
        return tuple(nodes)

    def _with_adds(self, units: dict[fx.Node, _Unit]) -> list[_Unit]:
        """The units, each with the add and the ReLU behind it. An add of two units belongs to its first operand."""
        done = []
        claimed: set[fx.Node] = set()
        for unit in sorted(units.values(), key=lambda unit: self._rank(unit)):
            done.append(unit if unit.relu else self._with_relu(self._with_add(unit, claimed)))
        return sorted(done, key=lambda unit: self._order[unit.nodes[0]])

    def _rank(self, unit: _Unit) -> tuple[int, int]:
        """First operands first."""
        nodes = self._past_identities(unit.nodes)
        is_first = any(user.args[:1] == (nodes[-1],) for user in nodes[-1].users)
        return (0 if is_first else 1), self._order[unit.end]

    def _with_add(self, unit: _Unit, claimed: set[fx.Node]) -> _Unit:
        nodes = self._past_identities(unit.nodes)
        end = nodes[-1]
        add = next(iter(end.users), None)
        if len(end.users) != 1 or add is None or add in claimed or not is_add(add):
            return unit
        first, second = add.args
        other = second if first is end else first
        writes_other = second is end and is_in_place(add)
        if other is end or not isinstance(other, fx.Node) or writes_other or not self._is_still(nodes[0], add, [other]):
            return unit
        claimed.add(add)
        return replace(unit, nodes=(*nodes, add), other=other, adds=True, adds_in_place=is_in_place(add))

    def _with_relu(self, unit: _Unit) -> _Unit:
        nodes = self._past_identities(unit.nodes)
        relu = next(iter(nodes[-1].users), None)
        if len(nodes[-1].users) != 1 or relu is None or relu.args[:1] != (nodes[-1],):
            return unit
        module = self._modules.get(relu)
        is_relu = is_relu_call(relu) if module is None else is_relu_module(module, relu)
        if not is_relu or not self._is_still(nodes[0], relu, [unit.other] if unit.adds else []):
            return unit
        return replace(unit, nodes=self._past_identities([*nodes, relu]), relu=True, activation=module)

    def _is_still(self, first: fx.Node, last: fx.Node, read: Iterable[fx.Node]) -> bool:
        """Whether what a chain reads cannot change while it waits for its last node."""
        inputs = [first.args[0], *read]
        return all(self._leaves(node, inputs) for node in self._between(first, last))

    def _between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        return [node for node, i in self._order.items() if self._order[first] < i < self._order[last]]

    def _leaves(self, node: fx.Node, inputs: Sequence[Any]) -> bool:
        """Whether ``node`` writes into none of ``inputs``."""
        module = self._modules.get(node)
        writes = is_in_place(node) if module is None else not is_pure(module)
        return not writes or self._is_fresh(node.args[0], inputs)

    def _is_fresh(self, written: Any, inputs: Sequence[Any]) -> bool:
        """Whether ``written`` is the output of a conv or BN, written over or not, and no input may be a part of it."""
        while isinstance(written, fx.Node) and self._hands_on(written):
            written = written.args[0]
        module = self._modules.get(written)
        is_new = module is not None and (type(module) is nn.Conv2d or batch_norm_reason(module) is None)
        return is_new and not any(self._may_be_part(node, written) for node in inputs)

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether the value at ``node`` is its first argument, written over or as it was."""
        module = self._modules.get(node)
        if module is None:
            return is_in_place(node)
        return type(module) is nn.Identity or bool(getattr(module, "inplace", False))

    def _may_be_part(self, node: fx.Node, whole: fx.Node) -> bool:
        """Whether ``node`` is ``whole``, or may be a view of it; most modules return a tensor of their own."""
        seen: set[fx.Node] = set()
        sources = [node]
        while sources:
            source = sources.pop()
            if source is whole:
                return True
            module = self._modules.get(source)
            is_new = module is not None and is_pure(module) and not self._hands_on(source)
            if not is_new and source not in seen:
                seen.add(source)
                sources += source.all_input_nodes
        return False

    def _runs(self, units: list[_Unit]) -> list[list[_Unit]]:
        """Units joined where one reads, alone, what another hands on activated."""
        runs: dict[fx.Node, list[_Unit]] = {}
        for unit in units:
            former = runs.get(unit.x)
            if former is not None and self._may_join(former, unit):
                del runs[unit.x]
                runs[unit.end] = [*former, unit]
            else:
                runs[unit.end] = [unit]
        return list(runs.values())

    def _may_join(self, former: list[_Unit], unit: _Unit) -> bool:
        last = former[-1]
        alone = len(last.end.users) == 1
        joined = last.relu and not last.adds and alone
        return joined and self._is_still(former[0].nodes[0], unit.end, [unit.other] if unit.adds else [])

    def _site(self, run: list[_Unit]) -> Site:
        last, x = run[-1], run[0].x
        chain = Chain(
            tuple(unit.pair for unit in run),
            None,
            last.adds,
            last.adds and last.other is x,
            last.relu,
            tuple(unit.activation for unit in run),
            last.adds_in_place,
        )
        nodes = tuple(node for unit in run for node in unit.nodes)
        return Site(chain, nodes, x, last.other if last.adds and last.other is not x else None)

    def _absorb_projections(self, finding: Finding) -> None:
        """Let a lone conv and BN that reads a chain's input, and is only added to it, run within that chain."""
        by_end = {site.nodes[-1]: site for site in finding.sites}
        for i, site in enumerate(finding.sites):
            shortcut = by_end.get(site.given) if site.given is not None else None
            if shortcut is None or not _is_projection(shortcut, site) or not self._may_absorb(site, shortcut):
                continue
            (pair,) = shortcut.chain.pairs
            nodes = tuple(sorted((*site.nodes, *shortcut.nodes), key=self._order.__getitem__))
            finding.sites[i] = Site(replace(site.chain, projection=pair), nodes, site.x)
            by_end.pop(site.given)
        kept = set(by_end.values())
        absorbed = {site.chain.projection for site in finding.sites} - {None}
        finding.sites = [
            site
            for site in finding.sites
            if site in kept or site.chain.projection or site.chain.pairs[0] not in absorbed
        ]

    def _with_pool(self, site: Site) -> Site:
        """The site and, where it is one activated conv and BN, a max-pool that alone reads it."""
        chain, end = site.chain, site.nodes[-1]
        user = next(iter(end.users), None)
        pool = self._modules.get(user) if user is not None and len(end.users) == 1 else None
        is_stem = len(chain.pairs) == 1 and chain.relu and not chain.adds
        if user is None or pool is None or not is_stem or pool_reason(pool) or self._call_reason(user):
            return site
        if not self._is_still(site.nodes[0], user, []):
            return site
        return Site(replace(chain, pool=pool), (*site.nodes, user), site.x)

    def _may_absorb(self, site: Site, shortcut: Site) -> bool:
        first = min(site.nodes[0], shortcut.nodes[0], key=self._order.__getitem__)
        return self._is_still(first, site.nodes[-1], [])


def _is_projection(shortcut: Site, site: Site) -> bool:
    chain = shortcut.chain
    is_lone = len(chain.pairs) == 1 and not chain.adds and not chain.relu and len(shortcut.nodes[-1].users) == 1
    return is_lone and shortcut.x is site.x
