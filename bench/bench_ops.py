"""Every op of a training step and of eval at places of ResNet-50: the launches of eager PyTorch, compiled, and the op.

Eager is the sequence of ATen ops that PyTorch's modules launch for the same result, from what they have stored by then:
where an op computes an activation or ``dz`` anew, eager reads the one that it kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import oracles
import pytest
import torch
import torch.nn.functional as F
from contest import BATCHES, COMPILED, CONTESTANTS, DEVICE, DTYPES, ENGINES
from op_samples import Operands
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fusedres import reference
from fusedres.layout import channels_last
from fusedres.problem import ConvProblem

aten = torch.ops.aten

#: name: (C, K, side of the map, kernel, stride)
CONVS = {
    "3x3 64": (64, 64, 56, 3, 1),
    "3x3 512": (512, 512, 7, 3, 1),
    "3x3 128 stride 2": (128, 128, 56, 3, 2),
    "1x1 256-64": (256, 64, 56, 1, 1),
    "1x1 64-256": (64, 256, 56, 1, 1),
}
MAPS = {"256 at 56": (256, 56), "2048 at 7": (2048, 7)}
STEM = {"64 at 112": (64, 112)}
POOL = (3, 2, 1)  # kernel_size, stride, padding
EPS = 1e-5


class Case(NamedTuple):
    """One call of the op ``name``, and ``eager(*operands)``, whose first result is the op's."""

    name: str
    args: tuple[Any, ...]
    eager: Callable[..., Any]
    operands: tuple[Any, ...]


class Norm(NamedTuple):
    """A BN as eager holds it."""

    mean: Tensor
    invstd: Tensor
    weight: Tensor
    bias: Tensor


class Maker(Operands):
    """Operands as a network has them: channels_last, and a BN has the statistics of what it normalises."""

    def weight(self, problem: ConvProblem) -> Tensor:
        return channels_last(super().weight(problem))

    def bn_of(self, z: Tensor) -> tuple[Tensor, Norm]:
        weight, bias = (self.normal(z.shape[1]).to(self.acc) for _ in range(2))
        stats = reference.channel_stats(z)
        bn = reference.bn_finalize(stats, weight, bias, None, None, None, 0.1, EPS)
        return bn, Norm(bn[0].clone(), bn[1].clone(), weight, bias)

    def stored(self, z: Tensor, norm: Norm) -> Tensor:
        """The activation that eager has kept."""
        return F.relu(normalised(z, norm))


def normalised(z: Tensor, norm: Norm) -> Tensor:
    return F.batch_norm(z, norm.mean, norm.invstd**-2 - EPS, norm.weight, norm.bias, False, 0.0, EPS)


def dbn(g: Tensor, z: Tensor, norm: Norm, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """BN's backward: (dz, dgamma, dbeta)."""
    return aten.native_batch_norm_backward(g, z, norm.weight, None, None, norm.mean, norm.invstd, True, EPS, mask)


def conv_backward(dz: Tensor, x: Tensor, w: Tensor, p: ConvProblem, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return aten.convolution_backward(dz, x, w, None, p.stride, p.padding, p.dilation, False, [0, 0], p.groups, mask)


# Convolutions


def conv_eval(make: Maker, p: ConvProblem) -> Case:
    """Folded conv, shortcut and ReLU."""
    x, w, bias, residual = make.input(p), make.weight(p), make.vector(p.K), make.output(p)

    def eager(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, w, bias, p.stride, p.padding) + residual)

    args = (x, w, bias, residual, None, p.stride, p.padding, p.dilation, p.groups, True, False)
    return Case("conv_fprop", args, eager, (x, w, bias, residual))


def conv_train(make: Maker, p: ConvProblem) -> Case:
    """BN and ReLU of the input, conv, and the statistics that the next BN needs."""
    x, w = make.input(p), make.weight(p)
    bn, norm = make.bn_of(x)

    def eager(x: Tensor, w: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.conv2d(F.relu(normalised(x, Norm(*norm))), w, None, p.stride, p.padding)
        return z, *torch.var_mean(z, (0, 2, 3), correction=0)

    args = (x, w, None, None, bn, p.stride, p.padding, p.dilation, p.groups, False, True)
    return Case("conv_fprop", args, eager, (x, w, *norm))


def _backward(make: Maker, p: ConvProblem) -> tuple[Tensor, ...]:
    """x before its BN, that BN's rows, eager's activation, w; the output's z, its BN's rows, g and that BN's sums."""
    x, w, z, g = make.input(p), make.weight(p), make.output(p), make.output(p)
    in_bn, in_norm = make.bn_of(x)
    bn, norm = make.bn_of(z)
    return x, in_bn, make.stored(x, in_norm), w, z, bn, norm, g, reference.drelu_dbn(g, None, z, bn, None, None)[1]


def conv_dgrad(make: Maker, p: ConvProblem) -> Case:
    """BN's backward, dgrad, and the backward of the ReLU before the conv."""
    x, in_bn, a, w, z, bn, norm, g, sums = _backward(make, p)

    def eager(g: Tensor, z: Tensor, a: Tensor, w: Tensor, *norm: Tensor) -> Tensor:
        dz, _, _ = dbn(g, z, Norm(*norm), [True, True, True])
        dx, _, _ = conv_backward(dz, a, w, p, [True, False, False])
        return aten.threshold_backward(dx, a, 0)

    geometry = (p.stride, p.padding, p.dilation, p.groups)
    args = (g, z, bn, sums, 1 / p.gemm_m, w, (p.H, p.W), *geometry, None, (1, 1), x, in_bn)
    return Case("conv_dgrad", args, eager, (g, z, a, w, *norm))


def conv_wgrad(make: Maker, p: ConvProblem) -> Case:
    """wgrad alone: eager has ``dz`` and the activation in memory, the op forms both anew."""
    x, in_bn, a, w, z, bn, _, g, sums = _backward(make, p)
    dz = reference.dbn(g, z, bn, sums, 1 / p.gemm_m)

    def eager(dz: Tensor, a: Tensor, w: Tensor) -> Tensor:
        return conv_backward(dz, a, w, p, [False, True, False])[1]

    args = (g, z, bn, sums, 1 / p.gemm_m, x, in_bn, (p.R, p.S), p.stride, p.padding, p.dilation, p.groups)
    return Case("conv_wgrad", args, eager, (dz, a, w))


CONV_FORMS = {"eval": conv_eval, "train": conv_train, "dgrad": conv_dgrad, "wgrad": conv_wgrad}


# Tails


def tail(make: Maker, size: tuple[int, ...], projection: bool) -> Case:
    """BN, shortcut (with a projection: through its own BN) and ReLU."""
    z, r = make.activation(*size), make.activation(*size)
    bn, norm = make.bn_of(z)
    r_bn, r_norm = make.bn_of(r)

    def eager(z: Tensor, r: Tensor, *norms: Tensor) -> Tensor:
        y = normalised(z, Norm(*norms[:4]))
        return F.relu(y + (normalised(r, Norm(*norms[4:])) if projection else r))

    return Case("scale_shift_add_relu", (z, bn, r, r_bn if projection else None, True), eager, (z, r, *norm, *r_norm))


def tail_backward(make: Maker, size: tuple[int, ...], projection: bool) -> Case:
    """ReLU's backward, and the sums that the backward of the BN before it needs."""
    dy, y, z, r = (make.activation(*size) for _ in range(4))
    bn, norm = make.bn_of(z)
    r_bn, r_norm = make.bn_of(r)

    def eager(dy: Tensor, y: Tensor, z: Tensor, r: Tensor, *norms: Tensor) -> tuple[Tensor, ...]:
        g = aten.threshold_backward(dy, y, 0)
        sums = dbn(g, z, Norm(*norms[:4]), [False, True, True])[1:]
        return g, *sums, *(dbn(g, r, Norm(*norms[4:]), [False, True, True])[1:] if projection else ())

    shortcut = (r, r_bn) if projection else (None, None)
    return Case("drelu_dbn", (dy, F.relu(y), z, bn, *shortcut), eager, (dy, F.relu(y), z, r, *norm, *r_norm))


def pool(make: Maker, size: tuple[int, ...], projection: bool) -> Case:
    """The stem's BN, ReLU and max-pool."""
    z = make.activation(*size)
    bn, norm = make.bn_of(z)

    def eager(z: Tensor, *norm: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(normalised(z, Norm(*norm))), *POOL)

    return Case("bn_relu_maxpool", (z, bn, *POOL), eager, (z, *norm))


def pool_backward(make: Maker, size: tuple[int, ...], projection: bool) -> Case:
    z = make.activation(*size)
    bn, norm = make.bn_of(z)
    a = make.stored(z, norm)
    y, tap = reference.bn_relu_maxpool(z, bn, *POOL)
    _, index = F.max_pool2d(a, *POOL, return_indices=True)
    dy = make.activation(*y.shape)

    def eager(dy: Tensor, index: Tensor, a: Tensor, z: Tensor, *norm: Tensor) -> Tensor:
        kernel, stride, padding = ([n, n] for n in POOL)
        da = aten.max_pool2d_with_indices_backward(dy, a, kernel, stride, padding, [1, 1], False, index)
        return dbn(aten.threshold_backward(da, a, 0), z, Norm(*norm), [True, True, True])[0]

    inv_count = 1 / (z.numel() // z.shape[1])
    return Case("bn_relu_maxpool_backward", (dy, tap, z, bn, *POOL, inv_count), eager, (dy, index, a, z, *norm))


#: name: (form, whether with a projection, maps)
TAILS = {
    "scale_shift_add_relu residual": (tail, False, MAPS),
    "scale_shift_add_relu projection": (tail, True, MAPS),
    "drelu_dbn residual": (tail_backward, False, MAPS),
    "drelu_dbn projection": (tail_backward, True, MAPS),
    "bn_relu_maxpool": (pool, False, STEM),
    "bn_relu_maxpool_backward": (pool_backward, False, STEM),
}


def prove_and_time(case: Case, contestant: str, time_call: Callable[..., None], group: str) -> None:
    """At most twice the error of plain ATen in the same dtype, then time."""
    case = tree_map_only(Tensor, lambda t: t.to(DEVICE), case)
    if contestant in ENGINES:
        op = getattr(torch.ops.fusedres, case.name)

        def call() -> Any:
            return op(*case.args)
    else:
        eager = torch.compile(case.eager) if contestant == COMPILED else case.eager

        @torch.no_grad()
        def call() -> Any:
            return eager(*case.operands)

    plain = getattr(reference, case.name)
    doubled = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, case.args)
    is_op = contestant in ENGINES
    oracles.assert_accurate(tuple(_results(r, is_op) for r in (call(), plain(*case.args), plain(*doubled))))
    time_call(call, group, rounds=20)


def _results(results: Any, is_op: bool) -> dict[str, Tensor]:
    """All results of an op; of eager's the first, for it has statistics and sums in another form."""
    results = results if isinstance(results, tuple) else (results,)
    return {str(i): t for i, t in enumerate(results if is_op else results[:1])}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", CONV_FORMS)
@pytest.mark.parametrize("place", CONVS)
def bench_conv(place: str, form: str, batch: int, dtype: str, contestant: str, time_call: Callable[..., None]) -> None:
    c, k, side, kernel, stride = CONVS[place]
    problem = ConvProblem(batch, c, side, side, k, kernel, kernel, (stride,) * 2, (kernel // 2,) * 2)
    case = CONV_FORMS[form](Maker(DTYPES[dtype]), problem)
    prove_and_time(case, contestant, time_call, f"{place} {form} {dtype} batch {batch}")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("form", "place"), [(form, place) for form, (_, _, places) in TAILS.items() for place in places]
)
def bench_tail(form: str, place: str, batch: int, dtype: str, contestant: str, time_call: Callable[..., None]) -> None:
    make, projection, places = TAILS[form]
    channels, side = places[place]
    case = make(Maker(DTYPES[dtype]), (batch, channels, side, side), projection)
    prove_and_time(case, contestant, time_call, f"{form} {place} {dtype} batch {batch}")
