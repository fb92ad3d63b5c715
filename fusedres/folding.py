"""Eval without gradients: BN folded into the convs, kept for as long as the parameters stay what they were.

A folded chain is remembered per module and checked at every use: by identity and version counter of every tensor it
came from, and by a fingerprint of every byte, for writes through ``.data`` move no counter. The native library reads
them at memory speed; what cannot be checked so (parameters on a GPU) is folded anew at every call. ``freeze`` does
without the fingerprint, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from fusedres import dispatch, native, ops
from fusedres.engines import FoldedChain, FoldedConv, FoldedRun
from fusedres.layout import acc_dtype
from fusedres.specs import ChainSpec, UnitSpec

if TYPE_CHECKING:
    from fusedres.functional import ConvBN


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    run: FoldedRun


#: The last folded form of each chain, by its first conv. Copies and pickles of a module do not carry it along.
_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


#: The first convs of chains whose parameters were declared final.
_frozen: WeakSet[nn.Module] = WeakSet()


def freeze(model: nn.Module) -> nn.Module:
    """Declare the parameters of ``model`` final, and return it: eval then reads each weight once a call, not twice.

    Folded weights still follow every change that moves a version counter (optimizers, ``copy_``, ``load_state_dict``,
    moves to another dtype). Unseen are only writes that bypass it: through ``.data``, NumPy or another process. Copies
    of the model are not frozen.
    """
    _frozen.update(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return model


def serves(spec: ChainSpec, x: Tensor, residual: Tensor | None, pairs: Sequence[ConvBN]) -> bool:
    """Whether the chain may run folded: every BN is constant and nobody needs a gradient."""
    units = (*spec.units, *([spec.projection] if spec.projection else []))
    if any(unit.batch_stats for unit in units):
        return False
    if not torch.is_grad_enabled():
        return True
    inputs = [x, residual, *(t for pair in pairs for t in _sources(pair))]
    return not any(t is not None and t.requires_grad for t in inputs)


def _sources(pair: ConvBN) -> tuple[Tensor | None, ...]:
    """Every tensor that the folded form of a conv and its BN depends on."""
    conv, bn = pair
    return conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var


def run(spec: ChainSpec, x: Tensor, residual: Tensor | None, pairs: Sequence[ConvBN]) -> Tensor:
    """The chain folded: ``x`` (N, C, H, W) -> (N, K, P, Q), both channels_last."""
    if torch.compiler.is_compiling():
        return _run_ops(_fold(spec, pairs, x.dtype), x, residual)
    key = _key(spec, x, pairs)
    entry = _entries.get(pairs[0].conv)
    if entry is None or key is None or entry.key != key:
        entry = _Entry(key or (), _compile(_fold(spec, pairs, x.dtype), x))
        if key is not None:
            _entries[pairs[0].conv] = entry
    return entry.run(x, residual)


def _key(spec: ChainSpec, x: Tensor, pairs: Sequence[ConvBN]) -> tuple[Any, ...] | None:
    """What the folded form depends on; None where changes could go unseen."""
    tensors = [t for pair in pairs for t in _sources(pair) if t is not None]
    is_counted = pairs[0].conv in _frozen and not any(t.is_inference() for t in tensors)
    has_fingerprint = native.missing is None and all(t.is_cpu for t in tensors)
    if not is_counted and not has_fingerprint:
        return None
    identity = tuple((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)
    return (
        spec,
        x.shape,
        x.dtype,
        x.device,
        identity,
        None if is_counted else torch.ops.fusedres_cpu.fingerprint(tensors).item(),
    )


def _fold(spec: ChainSpec, pairs: Sequence[ConvBN], dtype: torch.dtype) -> FoldedChain:
    units = (*spec.units, *([spec.projection] if spec.projection else []))
    folded = [_fold_conv(unit, pair, dtype) for unit, pair in zip(units, pairs, strict=True)]
    projection = folded.pop() if spec.projection else None
    return FoldedChain(tuple(folded), projection, spec.residual == "input", spec.relu)


def _fold_conv(unit: UnitSpec, pair: ConvBN, dtype: torch.dtype) -> FoldedConv:
    """Folded in float32 or better, cast once to the dtype of the activations."""
    conv, bn = pair
    acc = acc_dtype(conv.weight.dtype)
    constants = ops.bn_constants(bn.running_mean, bn.running_var, bn.weight, bn.bias, unit.eps, acc)
    bias = None if conv.bias is None else conv.bias.detach().to(acc)
    w, folded_bias = ops.bn_fold(conv.weight.detach().to(acc), bias, constants)
    return FoldedConv(w.to(dtype), folded_bias.to(dtype), *unit.conv)


def _compile(chain: FoldedChain, x: Tensor) -> FoldedRun:
    engine = dispatch.choose("conv_fprop", x.device.type, x.dtype).engine
    return engine.compile_folded(chain, x.shape) or (lambda x, residual: _run_ops(chain, x, residual))


def _run_ops(chain: FoldedChain, x: Tensor, residual: Tensor | None) -> Tensor:
    """One ``conv_fprop`` a conv, bias, shortcut and ReLU in its epilogue."""
    if chain.projection is not None:
        residual = _run_conv(chain.projection, x, None, False)
    elif chain.identity:
        residual = x
    for conv in chain.convs[:-1]:
        x = _run_conv(conv, x, None, True)
    return _run_conv(chain.convs[-1], x, residual, chain.relu)


def _run_conv(conv: FoldedConv, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    w, bias, *geometry = conv
    return ops.conv_fprop(x, w, bias, residual, None, *geometry, relu, False)[0]
