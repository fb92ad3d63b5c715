"""The same call again: what ran folded the last time runs once more without another look at any setting.

Checking that nothing changed takes a tenth of the time of reading every setting of a block. A network of chains, one
behind another, is checked at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fusedres import autocast, dispatch, folding
from fusedres.engines import Engine, EvalRun, NetworkRun
from fusedres.engines.nvidia import is_capturing
from fusedres.guards import Guard, Identity, all_hold, all_unchanged
from fusedres.inspection import is_followed, is_observed
from fusedres.layout import channels_last

if TYPE_CHECKING:
    from fusedres.functional import ConvBN

Modules = tuple[nn.Module, ...]


class _Call(NamedTuple):
    """What of a call the folded form depends on beside the modules. ``shortcut``: its kind."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    shortcut: str
    relu: bool
    is_autocast: bool
    engine: str | None
    freezes: int

    @classmethod
    def of(cls, x: Tensor, shortcut: ConvBN | Tensor | None, relu: bool) -> _Call:
        kind = "input" if shortcut is x else type(shortcut).__name__
        is_autocast = autocast.is_on(x.device.type)
        return cls(x.shape, x.dtype, x.device, kind, relu, is_autocast, dispatch.forced(), folding.freezes())


class _Recalled(NamedTuple):
    """A call that ran folded, and what must not have changed for the next one to be the same without another look."""

    call: _Call
    guards: tuple[Guard, ...]
    tensors: tuple[Tensor, ...]
    entry: folding.Entry


class Course(NamedTuple):
    """The modules of each chain that a network runs, in order, and whether that is so still, as far as none of its
    modules tells."""

    chains: list[Modules]
    holds: Callable[[], bool]


class _Network(NamedTuple):
    """A network's call that was nothing but recalled chains: what is below its parts, and those chains."""

    call: _Call
    course: Course
    below: Modules
    guards: tuple[Guard, ...]  # of its parts first
    identities: tuple[Identity, ...]  # of the tensors that the run follows by these alone
    tensors: tuple[Tensor, ...]
    others: tuple[tuple[nn.Module, _Recalled], ...]  # every other chain, and its first conv
    run: NetworkRun


class _Head(NamedTuple):
    """A head's call that an engine ran in one launch, and how its weight lay."""

    call: _Call
    guards: tuple[Guard, ...]
    weight: tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
    engine: Engine


#: The last such call of each chain, by its first conv, of each network, and of each head, by its last layer. Copies and
#: pickles of a module do not carry it along.
_chains: WeakKeyDictionary[nn.Module, _Recalled] = WeakKeyDictionary()
_networks: WeakKeyDictionary[object, _Network] = WeakKeyDictionary()
_heads: WeakKeyDictionary[nn.Module, _Head] = WeakKeyDictionary()

#: How often the call of a network was noted. One that changes all the time is not worth it.
_notes: WeakKeyDictionary[object, int] = WeakKeyDictionary()
_MOST_NOTES = 8


class _Running(threading.local):
    """The modules of every chain recalled since a network began, while one runs."""

    recalled: list[Modules] | None = None


_running = _Running()


def modules_of(pairs: Sequence[ConvBN], shortcut: ConvBN | Tensor | None, activations: Sequence[nn.Module]) -> Modules:
    """Every module that takes part in a chain, in order."""
    return (*chain.from_iterable(pairs), *(shortcut if isinstance(shortcut, tuple) else ()), *activations)


def recall(
    x: Tensor, pairs: Sequence[ConvBN], shortcut: ConvBN | Tensor | None, relu: bool, activations: Sequence[nn.Module]
) -> Tensor | None:
    """The chain's output where this call is the last one again; None where it must be looked at anew."""
    if not _may_recall(x):
        return None
    last = _chains.get(pairs[0].conv)
    modules = modules_of(pairs, shortcut, activations)
    if (
        last is None
        or last.call != _Call.of(x, shortcut, relu)
        or type(x) is not Tensor
        or not x.is_contiguous(memory_format=torch.channels_last)
        or not all_hold(last.guards, modules)
        or not last.entry.follows(pairs[0].conv, last.tensors)
    ):
        return None
    if _running.recalled is not None:
        _running.recalled.append(modules)
    folding.keep_for_graph(pairs[0].conv, last.entry, x)
    with autocast.suspended(x.device.type):
        return last.entry.run(x, None)


def remember(
    x: Tensor, pairs: Sequence[ConvBN], shortcut: ConvBN | Tensor | None, relu: bool, activations: Sequence[nn.Module]
) -> None:
    """Make the call that just ran folded one to ``recall``, if such a call can be recalled at all."""
    conv = pairs[0].conv
    entry = folding.entry_of(conv, x)
    is_other_tensor = isinstance(shortcut, Tensor) and shortcut is not x
    if entry is None or is_other_tensor or not _may_recall(x) or is_capturing(x.device):
        _chains.pop(conv, None)
        return
    guards = tuple(map(Guard.of, modules_of(pairs, shortcut, activations)))
    tensors = folding.tensors_of([*pairs, *([shortcut] if isinstance(shortcut, tuple) else [])])
    _chains[conv] = _Recalled(_Call.of(x, shortcut, relu), guards, tensors, entry)


def head(x: Tensor, avgpool: nn.Module, fc: nn.Linear) -> Tensor | None:
    """``fc`` of the means that ``avgpool`` makes, where this call is the last one again; None else."""
    last = _heads.get(fc)
    if (
        last is None
        or type(x) is not Tensor
        or not _may_recall(x)
        or last.call != _Call.of(x, None, False)
        or not all_hold(last.guards, (avgpool, fc))
        or last.weight != _lie(fc.weight)
    ):
        return None
    return last.engine.head(channels_last(x), fc.weight, fc.bias)


def remember_head(x: Tensor, avgpool: nn.Module, fc: nn.Linear, engine: Engine) -> None:
    """Make the call that ``engine`` is about to run one to ``head``."""
    if _may_recall(x):
        guards = tuple(map(Guard.of, (avgpool, fc)))
        _heads[fc] = _Head(_Call.of(x, None, False), guards, _lie(fc.weight), engine)


def _lie(w: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]:
    return w.shape, w.stride(), w.dtype, w.device


def network(
    net: object,
    parts: Modules,
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    course: Callable[[], Course | None],
) -> Tensor:
    """``forward(x)``, where nothing has changed since it was nothing but recalled chains these alone, one by one.

    x: (N, C, H, W). ``net`` stands for the network, and what is kept for it goes with it. ``forward`` must depend on
    ``parts`` and all modules below them alone, and on what its course holds by. ``course``: that, if ``forward`` runs
    nothing but chains.
    """
    if type(x) is not Tensor or not _may_recall(x) or is_capturing(x.device):
        return forward(x)
    outer = _running.recalled
    last = _networks.get(net)
    if last is not None and _is_same(last, parts, x):
        if outer is not None:
            outer += last.course.chains
        with autocast.suspended(x.device.type):
            return last.run(channels_last(x))
    recalled = _running.recalled = []
    try:
        y = forward(x)
    finally:
        _running.recalled = outer
    if outer is not None:
        outer += recalled
    if recalled and _notes.get(net, 0) < _MOST_NOTES:
        then = course()
        if then is not None and then.chains == recalled:
            _note(net, parts, x, then)
    return y


def _is_same(last: _Network, parts: Modules, x: Tensor) -> bool:
    """Whether this call is the last one again."""
    return (
        last.call == _Call.of(x, None, True)
        and all_hold(last.guards, (*parts, *last.below))
        and last.course.holds()
        and all_unchanged(last.identities, last.tensors)
        and all(chain.entry.follows(conv, chain.tensors) for conv, chain in last.others)
    )


def _note(net: object, parts: Modules, x: Tensor, course: Course) -> None:
    known_parts = set(parts)
    below = tuple(dict.fromkeys(m for part in parts for m in part.modules() if m not in known_parts))
    firsts = [of_chain[0] for of_chain in course.chains]
    known = [_chains.get(conv) for conv in firsts]
    if None in known:  # another thread let go of it
        return
    links = list(filter(None, known))
    frozen = [link for link in links if link.entry.is_frozen]
    others = tuple((conv, link) for conv, link in zip(firsts, links, strict=True) if not link.entry.is_frozen)
    _networks[net] = _Network(
        _Call.of(x, None, True),
        course,
        below,
        tuple(map(Guard.of, (*parts, *below))),
        tuple(identity for link in frozen for identity in link.entry.identities),
        tuple(tensor for link in frozen for tensor in link.tensors),
        others,
        _network_run([link.entry.run for link in links], x.shape),
    )
    _notes[net] = _notes.get(net, 0) + 1


def _network_run(chains: Sequence[EvalRun], x_shape: torch.Size) -> NetworkRun:
    """One chain after another: in one call where an engine has one, and nobody wants to see each."""
    at_once = dispatch.compile_network(chains, x_shape)

    def run(x: Tensor) -> Tensor:
        if at_once is not None and not is_observed():
            return at_once(x)
        for run_chain in chains:
            x = run_chain(x, None)
        return x

    return run


def _may_recall(x: Tensor) -> bool:
    """Under autocast only an input of its dtype enters a chain as it is."""
    return not (torch.is_grad_enabled() or is_followed()) and x.dtype == autocast.compute_dtype(x)
