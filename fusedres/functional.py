"""Fused conv-BN(-add)-ReLU on existing modules: from ``nn.Conv2d`` and BN modules to a chain of units.

Here a module's state is read (each BN's own mode, momentum, eps, buffers), bad input is refused before anything has
changed, and the form is chosen: folded where nobody needs gradients and BN is constant, the autograd chain otherwise,
and the modules themselves, one by one, where fusing could not honour what the user attached to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres import autocast, dispatch, folding, recall
from fusedres.autograd import chain, stem_chain
from fusedres.distributed import sync_group
from fusedres.inspection import (
    batch_norm_reason,
    conv_reason,
    head_reason,
    is_transformed,
    plain_reason,
    pool_reason,
    recorder_reason,
)
from fusedres.layout import channels_last
from fusedres.problem import Pair, as_pair, out_size
from fusedres.specs import ChainSpec, Memory, PoolSpec, Residual, UnitSpec, UnitTensors


class ConvBN(NamedTuple):
    """A conv and the BN behind it, of the types that ``fusedres.inspection`` accepts or not; those are asked first."""

    conv: nn.Conv2d
    bn: Any  # BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d, which share no base with these attributes


class ShortcutShapeError(ValueError):
    """The shortcut cannot be added to the residual branch without making it larger."""


def unit_spec(pair: ConvBN) -> UnitSpec:
    """What a step needs to know of a conv and its BN, read at every call: users change modes and momenta freely."""
    conv, bn = pair
    batch_stats = _uses_batch_stats(bn)
    momentum = getattr(bn, "momentum", None)
    if momentum is None and getattr(bn, "num_batches_tracked", None) is None:
        momentum = 0.0
    geometry = as_pair(conv.stride), _padding(conv), as_pair(conv.dilation), conv.groups
    return UnitSpec(*geometry, batch_stats, momentum, bn.eps, sync_group(bn))


def _padding(conv: nn.Conv2d) -> Pair:
    """The padding as numbers; "same" is even on both sides here, for ``conv_reason`` refuses the uneven kind."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        return as_pair([d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)])
    return as_pair(conv.padding)  # type: ignore[arg-type]  # the words were dealt with


def _uses_batch_stats(bn: nn.Module) -> bool:
    if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)):  # a frozen BN
        return False
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def unit_tensors(pair: ConvBN) -> UnitTensors:
    """The tensors of a conv and its BN. Running statistics only where this call reads or moves them."""
    conv, bn = pair
    mean, var, counter = bn.running_mean, bn.running_var, getattr(bn, "num_batches_tracked", None)
    if _uses_batch_stats(bn) and not (bn.training and getattr(bn, "track_running_stats", False)):
        mean = var = counter = None
    elif not _uses_batch_stats(bn):
        counter = None
    return UnitTensors(conv.weight, conv.bias, bn.weight, bn.bias, mean, var, counter)


def conv_bn_relu(x: Tensor, conv: nn.Conv2d, bn: nn.Module, relu: nn.Module | bool = True) -> Tensor:
    """``relu(bn(conv(x)))`` fused; without ReLU where ``relu`` is False.

    x: (N, C, H, W) float64 | float32 | bfloat16 | float16 -> (N, K, P, Q) of that dtype, in the memory format of ``x``.
    Raises TypeError, ValueError or RuntimeError for what the modules themselves would refuse.
    """
    tail = relu if isinstance(relu, nn.Module) else None

    def unfused(x: Tensor) -> Tensor:
        y = bn(conv(x))
        return tail(y) if tail is not None else F.relu(y) if relu else y

    activates, activations = (bool(relu), []) if tail is None else (True, [tail])
    return residual_chain(x, [ConvBN(conv, bn)], None, activates, "standard", unfused, activations)


def residual_chain(
    x: Tensor,
    pairs: Sequence[ConvBN],
    shortcut: ConvBN | Tensor | None,
    relu: bool,
    memory: Memory,
    unfused: Callable[[Tensor], Tensor],
    activations: Sequence[nn.Module] = (),
) -> Tensor:
    """A chain of conv-BN-ReLU ending in shortcut add and ReLU: the forward of every block here.

    ``shortcut``: ``x`` itself (identity), another tensor, a projection, or None. ``unfused(x)`` computes the same with
    the modules one by one; it runs where fusing cannot honour them. ``activations`` are the ReLU modules replaced.
    """
    recalled = recall.recall(x, pairs, shortcut, relu, activations) if isinstance(x, Tensor) else None
    if recalled is not None:
        return recalled
    projection = shortcut if isinstance(shortcut, ConvBN) else None
    convs = [*pairs, *([projection] if projection else [])]
    if chain_reason(convs, activations) is not None or not is_fusable_input(x, convs):
        return unfused(x)
    units = [unit_spec(pair) for pair in convs]
    shape = check_chain(x, pairs, units, shortcut)
    residual: Residual = "none"
    given = None
    if projection:
        residual = "projection"
    elif shortcut is x and x.shape == shape:
        residual = "input"
    elif isinstance(shortcut, Tensor):
        residual, given = "tensor", shortcut.expand(shape)
    x_format, x = x, _entering(x)
    given = None if given is None else channels_last(given.to(x.dtype))
    spec = ChainSpec(tuple(units[: len(pairs)]), units[-1] if projection else None, residual, relu, memory)
    is_folded = folding.serves(spec, x, given, convs)
    with autocast.suspended(x.device.type):
        if is_folded:
            y = folding.run(spec, x, given, convs)
        else:
            tensors = [unit_tensors(p) for p in convs]
            y = chain(spec, x, given, tensors[: len(pairs)], tensors[-1] if projection else None)
    if is_folded and x is x_format:
        recall.remember(x, pairs, shortcut, relu, activations)
    return leaving(y, x_format)


def chain_reason(convs: Sequence[ConvBN], activations: Sequence[nn.Module]) -> str | None:
    """Why these modules cannot run as one chain, or None."""
    if (reason := recorder_reason()) is not None:
        return reason
    for conv, bn in convs:
        reason = conv_reason(conv) or batch_norm_reason(bn)
        if reason is not None:
            return reason
    return next(filter(None, (plain_reason(a, nn.ReLU) for a in activations)), None)


def is_fusable_input(x: Any, convs: Sequence[ConvBN]) -> bool:
    """Whether ``x`` is what fused kernels take at all; the modules refuse, or serve, anything else themselves."""
    if not (isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point() and x.layout == torch.strided):
        return False
    return x.numel() > 0 or (0 not in x.shape[1:] and _is_share(convs))


def _is_share(convs: Sequence[ConvBN]) -> bool:
    """Whether a batch is but this process's share, which may be empty, wherever BN looks at the batch at all."""
    units = [unit_spec(pair) for pair in convs if chain_reason([pair], ()) is None]
    return any(unit.sync for unit in units) and all(unit.sync or not unit.batch_stats for unit in units)


def _entering(x: Tensor) -> Tensor:
    """``x`` as the ops take it: in autocast's dtype where autocast is on, dense channels_last."""
    return channels_last(x.to(autocast.compute_dtype(x)))


def leaving(y: Tensor, like: Tensor) -> Tensor:
    """``y`` in the memory format that eager would give it: contiguous where the input was, else channels_last."""
    return y if like.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


def check_chain(
    x: Tensor, pairs: Sequence[ConvBN], units: Sequence[UnitSpec], shortcut: ConvBN | Tensor | None
) -> torch.Size:
    """The chain's output shape. Refuses bad input before any statistics move; every message names shapes or dtypes.

    ``units`` describe ``pairs`` and, last, a projection.
    """
    shape = x.shape
    for pair, unit in zip(pairs, units, strict=False):
        shape = _check_pair(x, shape, pair, unit)
    if shortcut is None:
        return shape
    other = shortcut.shape if isinstance(shortcut, Tensor) else _check_pair(x, x.shape, shortcut, units[-1])
    broadcasts = len(other) == 4 and all(a in (1, b) for a, b in zip(other, shape, strict=True))
    if other != shape and not (isinstance(shortcut, Tensor) and broadcasts):
        raise ShortcutShapeError(f"the shortcut has shape {tuple(other)}, the residual branch {tuple(shape)}")
    return shape


def _check_pair(x: Tensor, shape: torch.Size, pair: ConvBN, unit: UnitSpec) -> torch.Size:
    """The output shape of a conv and BN given an input of ``shape``, device and dtype of ``x``."""
    conv, bn = pair
    w = conv.weight
    if min(*unit.stride, *unit.dilation, unit.groups) < 1 or min(unit.padding) < 0:
        raise RuntimeError(
            f"stride {unit.stride}, dilation {unit.dilation} and groups {unit.groups} must be positive, padding"
            f" {unit.padding} not negative"
        )
    if w.dim() != 4:
        raise RuntimeError(f"the weight of a 2-D convolution has four dimensions, not the shape {tuple(w.shape)}")
    if shape[1] != w.shape[1] * conv.groups:
        raise ValueError(
            f"expected {w.shape[1] * conv.groups} channels for a weight of shape {tuple(w.shape)}, got {tuple(shape)}"
        )
    if conv.bias is not None and conv.bias.shape != w.shape[:1]:
        raise RuntimeError(f"the conv bias has shape {tuple(conv.bias.shape)}, its weight {tuple(w.shape)}")
    if w.device != x.device:
        raise RuntimeError(f"the input is on {x.device}, the weight on {w.device}")
    if w.dtype != x.dtype and not autocast.is_on(x.device.type):
        raise RuntimeError(f"the input is {x.dtype}, the weight {w.dtype}")
    n, (k, _, r, s) = shape[0], w.shape
    p = out_size(shape[2], r, unit.stride[0], unit.padding[0], unit.dilation[0])
    q = out_size(shape[3], s, unit.stride[1], unit.padding[1], unit.dilation[1])
    if p < 1 or q < 1:
        raise RuntimeError(f"the kernel {(r, s)} does not fit into an input of shape {tuple(shape)}")
    out = torch.Size((n, k, p, q))
    if unit.batch_stats and unit.sync is None and n * p * q == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {out}")
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = getattr(bn, name)
        if vector is None:
            continue
        if vector.shape != w.shape[:1]:
            raise RuntimeError(f"BN {name} has shape {tuple(vector.shape)}, expected ({k},)")
        if vector.device != x.device:
            raise RuntimeError(f"the input is on {x.device}, BN {name} on {vector.device}")
    return out


def stem(x: Tensor, conv: nn.Conv2d, bn: nn.Module, relu: nn.Module | None, maxpool: nn.Module) -> Tensor:
    """``maxpool(relu(bn(conv(x))))``: the stem of a ResNet, in training with BN, ReLU and max-pool in one op.

    x: (N, C, H, W) as in ``conv_bn_relu``. ``relu``: a module, or None for ``F.relu``. Returns (N, K, P, Q),
    channels_last whatever that of ``x``, so that the network behind it stays so.
    """
    pair, relus = ConvBN(conv, bn), [] if relu is None else [relu]
    activations = [*relus, maxpool]
    unpooled = functools.partial(conv_bn_relu, conv=conv, bn=bn, relu=True if relu is None else relu)
    if is_transformed() or not is_fusable_input(x, [pair]):
        return maxpool(unpooled(x))
    x = channels_last(x)
    recalled = recall.recall(x, [pair], None, True, activations)
    if recalled is not None:
        return recalled
    if pool_reason(maxpool) is not None or chain_reason([pair], relus) is not None:
        return maxpool(unpooled(x))
    unit, pool, entering = unit_spec(pair), pool_spec(maxpool), _entering(x)
    check_chain(x, [pair], [unit], None)
    with autocast.suspended(x.device.type):
        spec = ChainSpec((unit,), None, "none", True, "standard")
        if not folding.serves(spec, entering, None, [pair]):
            return stem_chain(unit, pool, entering, unit_tensors(pair))
        y = folding.run(spec, entering, None, [pair], pool)
    if entering is x:
        recall.remember(x, [pair], None, True, activations)
    return y


def head(x: Tensor, avgpool: nn.Module, fc: nn.Module) -> Tensor | None:
    """``fc(avgpool(x).flatten(1))`` in one launch: (N, C, H, W) -> (N, F). None where the modules must run, or should.

    They run one by one where no engine has a launch for both, where gradients are needed, while a call is recorded or
    compiled, and for whatever is more than these two modules on tensors of one dtype.
    """
    recalled = recall.head(x, avgpool, fc) if isinstance(fc, nn.Linear) else None
    if recalled is not None:
        return recalled
    if type(x) is not Tensor or torch.compiler.is_compiling() or avgpool.training or fc.training:
        return None
    if head_reason(avgpool, fc) is not None or recorder_reason() is not None or not isinstance(fc, nn.Linear):
        return None
    w, bias = fc.weight, fc.bias
    parameters = [w] if bias is None else [w, bias]
    if any(type(t) is not nn.Parameter or t.dtype != x.dtype or t.device != x.device for t in parameters):
        return None
    if x.is_meta or x.dim() != 4 or x.numel() == 0 or x.shape[1] != w.shape[1] or autocast.compute_dtype(x) != x.dtype:
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        return None
    engine = dispatch.choose_head(w).engine
    if engine is None:
        return None
    recall.remember_head(x, avgpool, fc, engine)
    return engine.head(channels_last(x), w, bias)


def pool_spec(pool: nn.Module) -> PoolSpec:
    """Of a max-pool that ``pool_reason`` does not refuse."""
    return PoolSpec(*(as_pair(v)[0] for v in (pool.kernel_size, pool.stride, pool.padding)))  # type: ignore[arg-type]
