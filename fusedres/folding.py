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
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import autocast, dispatch, native, ops
from fusedres.engines import ConvT, Engine, EvalChain, EvalRun, FoldedConv, LiveConv
from fusedres.guards import Guard, all_hold
from fusedres.inspection import checked_module, is_traced, is_transformed
from fusedres.layout import acc_dtype
from fusedres.specs import ChainSpec, PoolSpec, UnitSpec

if TYPE_CHECKING:
    from fusedres.functional import ConvBN


class _Entry(NamedTuple):
    """A chain made to run, the calls it serves, those of any batch size, and what its tensors were (``_state``).

    No state where they are read at every call.
    """

    key: tuple[Any, ...]
    state: tuple[Any, ...] | None
    run: EvalRun

    def follows(self, conv: nn.Module, tensors: list[Tensor]) -> bool:
        """Whether the chain that begins with ``conv`` computes by what these tensors hold now."""
        return self.state is None or self.state == _state(conv, tensors)


class _Call(NamedTuple):
    """What of a call the folded form depends on beside the modules. ``shortcut``: its kind."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    shortcut: str
    relu: bool
    is_autocast: bool
    engine: str | None


class _Recalled(NamedTuple):
    """A call that ran folded, and what must not have changed for the next one to be the same without another look."""

    call: _Call
    guards: tuple[Guard, ...]
    tensors: list[Tensor]
    entry: _Entry


#: The last folded form of each chain, by its first conv. Copies and pickles of a module do not carry it along.
_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


#: The last such call of each chain, by its first conv.
_recalled: WeakKeyDictionary[nn.Module, _Recalled] = WeakKeyDictionary()

#: Folded forms that CUDA graphs were captured with, by first conv. A graph reads their weights as often as it is
#: replayed and keeps nothing alive, so they stay as long as the module.
_captured: WeakKeyDictionary[nn.Module, list[_Entry]] = WeakKeyDictionary()

#: The first convs of chains whose parameters were declared final.
_frozen: WeakSet[nn.Module] = WeakSet()


def freeze(model: nn.Module) -> nn.Module:
    """Declare the parameters of ``model`` final, and return it: eval then folds and packs its weights once.

    Folded weights still follow every change that moves a version counter (optimizers, ``copy_``, ``load_state_dict``,
    moves to another dtype). Unseen are only writes that bypass it: through ``.data``, NumPy or another process. Copies
    of the model are not frozen. A CUDA graph captured of a frozen model that had run before keeps the weights it was
    captured with, and them alive as long as the model. TypeError where ``model`` is no module.
    """
    convs = [module for module in checked_module(model).modules() if isinstance(module, nn.Conv2d)]
    _frozen.update(convs)
    for conv in convs:
        _recalled.pop(conv, None)
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


def _tensors(pairs: Sequence[ConvBN]) -> list[Tensor]:
    return [t for pair in pairs for t in _sources(pair) if t is not None]


def run(
    spec: ChainSpec, x: Tensor, residual: Tensor | None, pairs: Sequence[ConvBN], pool: PoolSpec | None = None
) -> Tensor:
    """The chain folded, and a max-pool behind it: ``x`` (N, C, H, W) -> (N, K, P, Q), both channels_last."""
    if torch.compiler.is_compiling() or x.is_meta:  # no bytes to be checked, nothing to be packed
        return _run_ops(_fold(spec, pairs, pool, x.dtype), x, residual)
    conv = pairs[0].conv
    key = spec, pool, x.shape[1:], x.dtype, x.device
    live = None if conv in _frozen else _engine(x).compile_live(_live(spec, pairs), x.dtype)
    if live is not None:
        live = _pooled(live, pool)
        _entries[conv] = _Entry(key, None, live)
        return live(x, residual)
    state = _state(conv, _tensors(pairs))
    entry = _entries.get(conv)
    if entry is not None and state is not None and entry.key == key and entry.state == state:
        _keep_for_graph(conv, entry, x)
        return entry.run(x, residual)
    if _is_capturing(x):  # the graph folds at every replay; before the first one there are no weights to be kept
        return _compile(_fold(spec, pairs, pool, x.dtype), x)(x, residual)
    _entries.pop(conv, None)
    entry = _Entry(key, state, _compile(_fold(spec, pairs, pool, x.dtype), x))
    if state is not None:
        _entries[conv] = entry
    return entry.run(x, residual)


def recall(
    x: Tensor, pairs: Sequence[ConvBN], shortcut: ConvBN | Tensor | None, relu: bool, activations: Sequence[nn.Module]
) -> Tensor | None:
    """The chain's output where this call is the last one again; None where it must be looked at anew.

    Checking that nothing changed takes a tenth of the time of reading every setting.
    """
    if not _may_recall(x):
        return None
    last = _recalled.get(pairs[0].conv)
    if (
        last is None
        or last.call != _call(x, shortcut, relu)
        or type(x) is not Tensor
        or not x.is_contiguous(memory_format=torch.channels_last)
        or not all_hold(last.guards, _modules(pairs, shortcut, activations))
        or not last.entry.follows(pairs[0].conv, last.tensors)
    ):
        return None
    _keep_for_graph(pairs[0].conv, last.entry, x)
    with autocast.suspended(x.device.type):
        return last.entry.run(x, None)


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _keep_for_graph(conv: nn.Module, entry: _Entry, x: Tensor) -> None:
    """While a CUDA graph is captured, keep what it will read."""
    if _is_capturing(x) and not any(entry is kept for kept in _captured.setdefault(conv, [])):
        _captured[conv].append(entry)


def remember(
    x: Tensor, pairs: Sequence[ConvBN], shortcut: ConvBN | Tensor | None, relu: bool, activations: Sequence[nn.Module]
) -> None:
    """Make the call that just ran folded one to ``recall``, if such a call can be recalled at all."""
    conv = pairs[0].conv
    entry = _entries.get(conv)
    is_other_tensor = isinstance(shortcut, Tensor) and shortcut is not x
    # Another thread may have left an entry of its own.
    is_ours = entry is not None and entry.key[2:] == (x.shape[1:], x.dtype, x.device)
    if entry is None or not is_ours or is_other_tensor or not _may_recall(x) or _is_capturing(x):
        _recalled.pop(conv, None)
        return
    guards = tuple(map(Guard.of, _modules(pairs, shortcut, activations)))
    tensors = _tensors([*pairs, *([shortcut] if isinstance(shortcut, tuple) else [])])
    _recalled[conv] = _Recalled(_call(x, shortcut, relu), guards, tensors, entry)


def _may_recall(x: Tensor) -> bool:
    """Under autocast only an input of its dtype enters a chain as it is."""
    is_recorded = torch.compiler.is_compiling() or is_traced() or is_transformed()
    return not (torch.is_grad_enabled() or is_recorded) and x.dtype == autocast.compute_dtype(x)


def _call(x: Tensor, shortcut: ConvBN | Tensor | None, relu: bool) -> _Call:
    kind = "input" if shortcut is x else type(shortcut).__name__
    return _Call(x.shape, x.dtype, x.device, kind, relu, autocast.is_on(x.device.type), dispatch.forced())


def _modules(
    pairs: Sequence[ConvBN], shortcut: ConvBN | Tensor | None, activations: Sequence[nn.Module]
) -> tuple[nn.Module, ...]:
    """Every module that takes part, in order."""
    return (*chain.from_iterable(pairs), *(shortcut if isinstance(shortcut, tuple) else ()), *activations)


def _state(conv: nn.Module, tensors: list[Tensor]) -> tuple[Any, ...] | None:
    """Identity, version and, unless the chain that ``conv`` begins is frozen, every byte; None where none can tell."""
    identity = [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors]
    if conv in _frozen and not any(t.is_inference() for t in tensors):
        return identity, None
    if native.missing is not None or not all(t.is_cpu for t in tensors):
        return None
    return identity, torch.ops.fusedres_cpu.fingerprint(tensors).item()


def _chain(spec: ChainSpec, convs: list[ConvT]) -> EvalChain[ConvT]:
    projection = convs.pop() if spec.projection else None
    residual = spec.residual
    return EvalChain(tuple(convs), projection, residual == "input", spec.relu, given=residual == "tensor")


def _units(spec: ChainSpec) -> tuple[UnitSpec, ...]:
    """A projection's last, as the pairs are."""
    return spec.units if spec.projection is None else (*spec.units, spec.projection)


def _live(spec: ChainSpec, pairs: Sequence[ConvBN]) -> EvalChain[LiveConv]:
    return _chain(spec, [_live_conv(unit, pair) for unit, pair in zip(_units(spec), pairs, strict=True)])


def _live_conv(unit: UnitSpec, pair: ConvBN) -> LiveConv:
    conv, bn = pair
    vectors = conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var
    return LiveConv(conv.weight, *vectors, unit.eps, *unit.conv)


def _fold(spec: ChainSpec, pairs: Sequence[ConvBN], pool: PoolSpec | None, dtype: torch.dtype) -> EvalChain[FoldedConv]:
    convs = [_fold_conv(unit, pair, dtype) for unit, pair in zip(_units(spec), pairs, strict=True)]
    return replace(_chain(spec, convs), pool=pool)


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
    return _pooled(_compile(replace(chain, pool=None), x), chain.pool)


def _pooled(run: EvalRun, pool: tuple[int, int, int] | None) -> EvalRun:
    """``run`` and, where there is one, the pool behind it in a launch of its own."""
    return run if pool is None else lambda x, residual: F.max_pool2d(run(x, residual), *pool)


def _run_ops(chain: EvalChain[FoldedConv], x: Tensor, residual: Tensor | None) -> Tensor:
    """One ``conv_fprop`` a conv, bias, shortcut and ReLU in its epilogue; the pool apart."""
    if chain.projection is not None:
        residual = _run_conv(chain.projection, x, None, False)
    elif chain.identity:
        residual = x
    for conv in chain.convs[:-1]:
        x = _run_conv(conv, x, None, True)
    y = _run_conv(chain.convs[-1], x, residual, chain.relu)
    return y if chain.pool is None else F.max_pool2d(y, *chain.pool)


def _run_conv(conv: FoldedConv, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    w, bias, *geometry = conv
    return ops.conv_fprop(x, w, bias, residual, None, *geometry, relu, False)[0]
