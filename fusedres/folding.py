"""Eval without gradients: constant BN joins the convs, and follows every change of the parameters.

Where the engine can, a chain reads its parameters at every call and nothing is kept that could go stale. Else BN is
folded into the weights, and the folded chain is remembered per module and checked at every use: by identity and version
counter of every tensor it came from, and by a fingerprint of every byte, for writes through ``.data`` move no counter.
The native library reads them at memory speed; what cannot be checked so (parameters on a GPU) is folded anew at every
call. ``freeze`` lets every engine keep folded weights, and does without the fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import dispatch, native, ops
from fusedres.engines import ConvT, Engine, EvalChain, EvalRun, FoldedConv, LiveConv
from fusedres.engines.nvidia import is_capturing
from fusedres.guards import Identity, all_unchanged
from fusedres.inspection import checked_module
from fusedres.layout import acc_dtype
from fusedres.problem import is_plain_gemm
from fusedres.specs import ChainSpec, PoolSpec, UnitSpec

if TYPE_CHECKING:
    from fusedres.functional import ConvBN


class State(NamedTuple):
    """What the tensors of a chain were, and every byte of them unless their version counters are to be believed."""

    identities: tuple[Identity, ...]
    fingerprint: int | None


class Entry(NamedTuple):
    """A chain made to run, the calls it serves, those of any batch size, and what its tensors were.

    No state where they are read at every call.
    """

    key: tuple[Any, ...]
    state: State | None
    run: EvalRun

    @property
    def identities(self) -> tuple[Identity, ...]:
        """What its tensors were; none where they are read at every call."""
        return () if self.state is None else self.state.identities

    @property
    def is_frozen(self) -> bool:
        """Whether it follows its tensors by their identities alone."""
        return self.state is not None and self.state.fingerprint is None

    def follows(self, conv: nn.Module, tensors: tuple[Tensor, ...]) -> bool:
        """Whether the chain that begins with ``conv`` computes by what these tensors hold now."""
        if self.state is None:
            return True
        if self.is_frozen:
            return all_unchanged(self.state.identities, tensors)
        return self.state == _state(conv, tensors)


#: The last folded form of each chain, by its first conv. Copies and pickles of a module do not carry it along.
_entries: WeakKeyDictionary[nn.Module, Entry] = WeakKeyDictionary()

#: Folded forms that CUDA graphs were captured with, by first conv. A graph reads their weights as often as it is
#: replayed and keeps nothing alive, so they stay as long as the module.
_captured: WeakKeyDictionary[nn.Module, list[Entry]] = WeakKeyDictionary()

#: The first convs of chains whose parameters were declared final, and how often that was done.
_frozen: WeakSet[nn.Module] = WeakSet()
_freezes = 0


def freezes() -> int:
    """How often something was frozen: a number that never comes again."""
    return _freezes


def freeze(model: nn.Module) -> nn.Module:
    """Declare the parameters of ``model`` final, and return it: eval then folds and packs its weights once.

    Folded weights still follow every change that moves a version counter (optimizers, ``copy_``, ``load_state_dict``,
    moves to another dtype). Unseen are only writes that bypass it: through ``.data``, NumPy or another process. Copies
    of the model are not frozen. A CUDA graph captured of a frozen model that had run before keeps the weights it was
    captured with, and them alive as long as the model. TypeError where ``model`` is no module.
    """
    global _freezes
    _frozen.update(module for module in checked_module(model).modules() if isinstance(module, nn.Conv2d))
    _freezes += 1
    return model


def serves(spec: ChainSpec, x: Tensor, residual: Tensor | None, pairs: Sequence[ConvBN]) -> bool:
    """Whether the chain may run folded: every BN is constant and nobody needs a gradient."""
    if any(unit.batch_stats for unit in _units(spec)):
        return False
    if not torch.is_grad_enabled():
        return True
    inputs = [x, residual, *(t for pair in pairs for t in _sources(pair))]
    return not any(t is not None and t.requires_grad for t in inputs)


def _sources(pair: ConvBN) -> tuple[Tensor | None, ...]:
    """Every tensor that the folded form of a conv and its BN depends on."""
    conv, bn = pair
    return conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var


def tensors_of(pairs: Sequence[ConvBN]) -> tuple[Tensor, ...]:
    """Every tensor that the folded form of these convs and BNs depends on."""
    return tuple(t for pair in pairs for t in _sources(pair) if t is not None)


def run(
    spec: ChainSpec, x: Tensor, residual: Tensor | None, pairs: Sequence[ConvBN], pool: PoolSpec | None = None
) -> Tensor:
    """The chain folded, and a max-pool behind it: ``x`` (N, C, H, W) -> (N, K, P, Q), both channels_last."""
    if torch.compiler.is_compiling() or x.is_meta:  # no bytes to be checked, nothing to be packed
        return _run_ops(_fold(spec, pairs, pool, x.dtype), x, residual)
    conv = pairs[0].conv
    key = spec, pool, x.shape[1:], x.dtype, x.device
    live = None if conv in _frozen else _engine(x).compile_live(_live(spec, pairs, pool), x.dtype)
    if live is not None:
        _entries[conv] = Entry(key, None, live)
        return live(x, residual)
    state = _state(conv, tensors_of(pairs))
    entry = _entries.get(conv)
    if entry is not None and state is not None and entry.key == key and entry.state == state:
        keep_for_graph(conv, entry, x)
        return entry.run(x, residual)
    if is_capturing(x.device):  # the graph folds at every replay; before the first one there are no weights to be kept
        return _compile(_fold(spec, pairs, pool, x.dtype), x)(x, residual)
    _entries.pop(conv, None)
    entry = Entry(key, state, _compile(_fold(spec, pairs, pool, x.dtype), x))
    if state is not None:
        _entries[conv] = entry
    return entry.run(x, residual)


def entry_of(conv: nn.Module, x: Tensor) -> Entry | None:
    """The folded form that the chain beginning with ``conv`` ran in on ``x``, if it was kept."""
    entry = _entries.get(conv)
    # Another thread may have left an entry of its own.
    is_ours = entry is not None and entry.key[2:] == (x.shape[1:], x.dtype, x.device)
    return entry if is_ours else None


def keep_for_graph(conv: nn.Module, entry: Entry, x: Tensor) -> None:
    """While a CUDA graph is captured, keep what it will read."""
    if is_capturing(x.device) and not any(entry is kept for kept in _captured.setdefault(conv, [])):
        _captured[conv].append(entry)


def _state(conv: nn.Module, tensors: tuple[Tensor, ...]) -> State | None:
    """What the tensors are, every byte unless the chain that ``conv`` begins is frozen; None where none can tell."""
    identities = tuple(map(Identity.of, tensors))
    if conv in _frozen and not any(t.is_inference() for t in tensors):
        return State(identities, None)
    if native.missing is not None or not all(t.is_cpu for t in tensors):
        return None
    return State(identities, torch.ops.fusedres_cpu.fingerprint(tensors).item())


def _chain(spec: ChainSpec, convs: list[ConvT], pool: PoolSpec | None) -> EvalChain[ConvT]:
    projection = convs.pop() if spec.projection else None
    residual = spec.residual
    return EvalChain(tuple(convs), projection, residual == "input", spec.relu, pool, residual == "tensor")


def _units(spec: ChainSpec) -> tuple[UnitSpec, ...]:
    """A projection's last, as the pairs are."""
    return spec.units if spec.projection is None else (*spec.units, spec.projection)


def _live(spec: ChainSpec, pairs: Sequence[ConvBN], pool: PoolSpec | None) -> EvalChain[LiveConv]:
    return _chain(spec, [_live_conv(unit, pair) for unit, pair in zip(_units(spec), pairs, strict=True)], pool)


def _live_conv(unit: UnitSpec, pair: ConvBN) -> LiveConv:
    conv, bn = pair
    vectors = conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var
    return LiveConv(conv.weight, *vectors, unit.eps, *unit.conv)


def _fold(spec: ChainSpec, pairs: Sequence[ConvBN], pool: PoolSpec | None, dtype: torch.dtype) -> EvalChain[FoldedConv]:
    convs = [_fold_conv(unit, pair, dtype) for unit, pair in zip(_units(spec), pairs, strict=True)]
    return _chain(spec, convs, pool)


def _fold_conv(unit: UnitSpec, pair: ConvBN, dtype: torch.dtype) -> FoldedConv:
    """Folded in float32 or better, cast once to the dtype of the activations."""
    conv, bn = pair
    acc = acc_dtype(conv.weight.dtype)
    constants = ops.bn_constants(bn.running_mean, bn.running_var, bn.weight, bn.bias, unit.eps, acc)
    bias = None if conv.bias is None else conv.bias.detach().to(acc)
    w, folded_bias = ops.bn_fold(conv.weight.detach().to(acc), bias, constants)
    return FoldedConv(w.to(dtype), folded_bias.to(dtype), *unit.conv)


def _engine(x: Tensor) -> Engine:
    return dispatch.choose("conv_fprop", x.device.type, x.dtype).engine


def _compile(chain: EvalChain[FoldedConv], x: Tensor) -> EvalRun:
    run = dispatch.choose_folded(chain).engine.compile_folded(chain, x.shape)
    if run is not None:
        return run
    if chain.pool is None:
        return lambda x, residual: _run_ops(chain, x, residual)
    unpooled, pool = _compile(replace(chain, pool=None), x), chain.pool
    return lambda x, residual: F.max_pool2d(unpooled(x, residual), *pool)


def _run_ops(chain: EvalChain[FoldedConv], x: Tensor, residual: Tensor | None) -> Tensor:
    """One op a conv, bias, shortcut and ReLU in its epilogue, a projection in the last one's; the pool apart."""
    source, last = x, chain.convs[-1]
    for conv in chain.convs[:-1]:
        x = _run_conv(conv, x, None, True)
    if chain.projection is not None and _adds(chain.projection, last, x):
        operands = x, last.w, last.bias, source, chain.projection.w, chain.projection.bias, chain.projection.stride
        y = ops.conv_projection(*operands, chain.relu)
    else:
        if chain.projection is not None:
            residual = _run_conv(chain.projection, source, None, False)
        elif chain.identity:
            residual = source
        y = _run_conv(last, x, residual, chain.relu)
    return y if chain.pool is None else F.max_pool2d(y, *chain.pool)


def _adds(projection: FoldedConv, last: FoldedConv, x: Tensor) -> bool:
    """Whether both convs are of the kind that one launch computes, and the engine has such a launch."""
    is_plain = all(
        is_plain_gemm(conv.w.shape[2:], stride, conv.padding, conv.groups)
        for conv, stride in ((last, last.stride), (projection, (1, 1)))
    )
    return is_plain and dispatch.adds_projection(x.device.type, x.dtype)


def _run_conv(conv: FoldedConv, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    w, bias, *geometry = conv
    return ops.conv_fprop(x, w, bias, residual, None, *geometry, relu, False)[0]
