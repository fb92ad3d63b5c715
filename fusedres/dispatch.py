"""Which engine computes an op: one table in order of preference, and the reasons why a preferred one was passed over.

The decision looks at the tensors' device and dtype, never at what else the machine has. ``engine(name)`` and the
environment variable ``FUSEDRES_ENGINE`` put one engine first; what it cannot do still falls to the next.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from fusedres import tuning
from fusedres.engines import Engine, EvalChain, EvalRun, FoldedConv, NetworkRun, nvidia
from fusedres.engines.cpu import CPU
from fusedres.engines.cuda import CUDA
from fusedres.engines.cudnn import CUDNN
from fusedres.engines.reference import REFERENCE
from fusedres.engines.triton import TRITON

#: Every engine, the preferred first. The last one can do everything.
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (CUDA, CUDNN, TRITON, CPU, REFERENCE)}

_forced: ContextVar[str | None] = ContextVar("fusedres_engine", default=None)
_meta_stands_for: ContextVar[str] = ContextVar("fusedres_meta_stands_for", default="meta")


class Choice(NamedTuple):
    """The engine that computes an op, and ``(engine, reason)`` of every one that was asked before it."""

    engine: Engine
    passed_over: tuple[tuple[str, str], ...]


class HeadChoice(NamedTuple):
    """The engine that runs a head in one launch, None where its modules run one by one; ``passed_over`` as above."""

    engine: Engine | None
    passed_over: tuple[tuple[str, str], ...]


@contextmanager
def engine(name: str | None) -> Iterator[None]:
    """Prefer the engine ``name`` within this context (this thread, and the backward of what is computed here).

    ``None`` restores the static rule. Raises ValueError for a name that is no engine.
    """
    token = _forced.set(_known(name))
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def meta_as(device_type: str) -> Iterator[None]:
    """Within this context choose for meta tensors what those of ``device_type`` would get: a plan without a device."""
    token = _meta_stands_for.set(device_type)
    try:
        yield
    finally:
        _meta_stands_for.reset(token)


def as_in_forward(name: str | None, tunes: bool) -> AbstractContextManager[None]:
    """The context for the backward of what ran while ``forced()`` was ``name`` and ``tuning.is_on()`` was ``tunes``:
    nothing where they still are."""
    return nullcontext() if (name, tunes) == (forced(), tuning.is_on()) else _as(name, tunes)


@contextmanager
def _as(name: str | None, tunes: bool) -> Iterator[None]:
    with engine(name), tuning.autotune(tunes):
        yield


@torch.compiler.assume_constant_result
def forced() -> str | None:
    """The engine that ``engine(...)`` or else ``FUSEDRES_ENGINE`` prefers, if any. ValueError for an unknown name."""
    return _forced.get() or _known(os.environ.get("FUSEDRES_ENGINE") or None)


def _known(name: str | None) -> str | None:
    if name is not None and name not in ENGINES:
        raise ValueError(f"no engine is named {name!r}; there are {', '.join(ENGINES)}")
    return name


def choose(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    """The engine for ``op`` on tensors of this device and dtype."""
    if device_type == "meta":
        device_type = _meta_stands_for.get()
    return _choose(op, device_type, dtype, forced(), nvidia.planned())


@torch.compiler.assume_constant_result
def fuses_prologue(op: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether the engine for ``op`` applies prologues itself; otherwise the caller materialises them."""
    return choose(op, device_type, dtype).engine.fuses_prologue


@torch.compiler.assume_constant_result
def adds_projection(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the engine of the convs has the last conv of a folded block and its projection in one launch."""
    return choose("conv_fprop", device_type, dtype).engine.adds_projection


@torch.compiler.assume_constant_result
def flops_per_byte(device_type: str, dtype: torch.dtype) -> int:
    """What the engine of the convs would do for a byte less of traffic; 0 where it stores every conv's output."""
    return choose("conv_fprop", device_type, dtype).engine.flops_per_byte


@functools.cache
def _choose(
    op: str, device_type: str, dtype: torch.dtype, first: str | None, planned: tuple[int, int] | None
) -> Choice:
    """``planned``: the capability that engines look up themselves. A machine's own does not change."""
    passed_over: list[tuple[str, str]] = []
    for candidate in _preferred(first):
        reason = candidate.rejects(op, device_type, dtype)
        if reason is None and candidate.name != first:
            reason = candidate.only_by_name(device_type)
        if reason is None:
            return Choice(candidate, tuple(passed_over))
        passed_over.append((candidate.name, reason))
    raise RuntimeError(f"no engine computes {op} for {dtype} on {device_type}: {passed_over}")


def _preferred(first: str | None) -> list[Engine]:
    """All engines in order of preference, the one named ``first`` before the others."""
    return sorted(ENGINES.values(), key=lambda e: e.name != first)


def choose_folded(chain: EvalChain[FoldedConv]) -> Choice:
    """The engine that runs a folded chain: the first that has a way of its own, at the latest the one of its convs."""
    w = chain.convs[0].w
    of_convs = choose("conv_fprop", w.device.type, w.dtype).engine
    passed_over: list[tuple[str, str]] = []
    for candidate in itertools.takewhile(lambda engine: engine is not of_convs, _preferred(forced())):
        reason = candidate.folded_reason(chain)
        if reason is None and candidate.name != forced():
            reason = candidate.folded_only_by_name(chain)
        if reason is None:
            return Choice(candidate, tuple(passed_over))
        passed_over.append((candidate.name, reason))
    return Choice(of_convs, tuple(passed_over))


def compile_network(chains: Sequence[EvalRun], x_shape: torch.Size) -> NetworkRun | None:
    """One call for ``chains``, which engines compiled, one behind another, where an engine makes one of them."""
    return next(filter(None, (engine.compile_network(chains, x_shape) for engine in ENGINES.values())), None)


def choose_head(w: torch.Tensor) -> HeadChoice:
    """The engine for a head whose fully connected layer has the weight ``w`` (F, C)."""
    passed_over: list[tuple[str, str]] = []
    for candidate in _preferred(forced()):
        reason = candidate.head_reason(w)
        if reason is None and candidate.name != forced():
            reason = candidate.head_only_by_name()
        if reason is None:
            return HeadChoice(candidate, tuple(passed_over))
        passed_over.append((candidate.name, reason))
    return HeadChoice(None, tuple(passed_over))


def caller(op: str) -> Callable[..., Any]:
    """The implementation of ``fusedres::<op>``: hand the call to the engine that its first tensor chooses."""

    def call(first: torch.Tensor, *args: Any) -> Any:
        return getattr(choose(op, first.device.type, first.dtype).engine, op)(first, *args)

    def tuned_call(first: torch.Tensor, *args: Any) -> Any:
        engine = choose(op, first.device.type, first.dtype).engine
        if (engine is CUDNN or engine is TRITON) and tuning.is_on():
            return tuning.fastest(op, engine, (first, *args))(first, *args)
        return getattr(engine, op)(first, *args)

    chosen = tuned_call if op in tuning.OPS else call
    return _with_statistics(chosen) if op == "conv_fprop" else chosen


def _with_statistics(conv_fprop: Callable[..., Any]) -> Callable[..., Any]:
    """``conv_fprop``, but an engine asked for by name makes the statistics that its engine would make apart."""

    def call(x: torch.Tensor, *args: Any) -> Any:
        *conv, genstats = args
        first = ENGINES.get(forced() or "") if genstats else None
        if first is None or not _makes_statistics(first, x.device.type, x.dtype):
            return conv_fprop(x, *args)
        y, _ = conv_fprop(x, *conv, False)
        return y, first.channel_stats(y)

    return call


def _makes_statistics(first: Engine, device_type: str, dtype: torch.dtype) -> bool:
    of_conv = choose("conv_fprop", device_type, dtype).engine
    is_apart = of_conv is not first and of_conv.statistics_apart
    return is_apart and first.rejects("channel_stats", device_type, dtype) is None
