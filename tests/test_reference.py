"""The reference ops against float64 oracles made of torch.nn.functional and autograd alone."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from op_samples import POINTWISE, PROBLEMS, Operands
from torch import Tensor

from fusedres import reference
from fusedres.layout import per_channel
from fusedres.problem import ConvProblem

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-5
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
pointwise_problems = pytest.mark.parametrize("problem", [PROBLEMS[n] for n in POINTWISE], ids=POINTWISE)


@pytest.fixture
def make() -> Operands:
    return Operands(torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def geometry(problem: ConvProblem) -> tuple:
    return problem.stride, problem.padding, problem.dilation, problem.groups


def bn_rows(z: Tensor, weight: Tensor, bias: Tensor, batch_stats: bool = True) -> Tensor:
    """mean, invstd, scale, shift of batch-statistics BN on ``z``, or of BN with some constants."""
    var, mean = torch.var_mean(z.detach(), (0, 2, 3), unbiased=False)
    if not batch_stats:
        mean, var = mean + 0.1, var + 0.3
    invstd = (var + EPS).rsqrt()
    scale = (weight * invstd).detach()
    return torch.stack([mean, invstd, scale, bias.detach() - mean * scale])


def batch_norm(z: Tensor, weight: Tensor, bias: Tensor, batch_stats: bool = True) -> Tensor:
    """torch's BN, differentiable, with the statistics of ``bn_rows``."""
    if batch_stats:
        return F.batch_norm(z, None, None, weight, bias, True, 0.0, EPS)
    var, mean = torch.var_mean(z.detach(), (0, 2, 3), unbiased=False)
    return F.batch_norm(z, mean + 0.1, var + 0.3, weight, bias, False, 0.0, EPS)


class Unit(NamedTuple):
    """u -> BN -> ReLU -> conv -> z -> BN -> n, with autograd recording."""

    u: Tensor
    weight0: Tensor
    bias0: Tensor
    activated: Tensor  # before the first ReLU
    w: Tensor
    z: Tensor
    weight1: Tensor
    bias1: Tensor
    n: Tensor
    bn0: Tensor
    bn1: Tensor
    inv_count: float

    @classmethod
    def of(cls, make: Operands, problem: ConvProblem, batch_stats: bool = True) -> Unit:
        u, w = make.input(problem).requires_grad_(), make.weight(problem).requires_grad_()
        weight0, bias0 = (make.normal(problem.C).requires_grad_() for _ in range(2))
        weight1, bias1 = (make.normal(problem.K).requires_grad_() for _ in range(2))
        activated = batch_norm(u, weight0, bias0)
        z = F.conv2d(F.relu(activated), w, None, *geometry(problem))
        n = batch_norm(z, weight1, bias1, batch_stats)
        rows = bn_rows(u, weight0, bias0), bn_rows(z, weight1, bias1, batch_stats)
        return cls(
            u, weight0, bias0, activated, w, z, weight1, bias1, n, *rows, 1 / problem.gemm_m if batch_stats else 0.0
        )

    def gradient(self, g: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.n, of, g, retain_graph=True)

    def sums(self, g: Tensor) -> Tensor:
        return torch.stack(self.gradient(g, self.bias1, self.weight1))

    def previous_sums(self, g: Tensor) -> Tensor:
        return torch.stack(self.gradient(g, self.bias0, self.weight0))

    def masked_gradient(self, g: Tensor) -> Tensor:
        return self.gradient(g, self.activated)[0]


@problems
def test_conv_fprop_applies_prologue_bias_residual_and_relu(problem: ConvProblem, make: Operands) -> None:
    x, w, residual, bias = make.input(problem), make.weight(problem), make.output(problem), make.normal(problem.K)
    in_bn = make.bn(problem.C)
    y, stats = reference.conv_fprop(x, w, bias, residual, in_bn, *geometry(problem), True, True)
    activated = F.relu(x * in_bn[2].view(1, -1, 1, 1) + in_bn[3].view(1, -1, 1, 1))
    close(y, F.relu(F.conv2d(activated, w, bias, *geometry(problem)) + residual))
    var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
    close(stats, torch.stack([torch.full_like(mean, problem.gemm_m), mean, var * problem.gemm_m]))


@problems
def test_conv_fprop_without_options_is_conv2d(problem: ConvProblem, make: Operands) -> None:
    x, w = make.input(problem), make.weight(problem)
    y, stats = reference.conv_fprop(x, w, None, None, None, *geometry(problem), False, False)
    close(y, F.conv2d(x, w, None, *geometry(problem)))
    assert stats.shape == (0,)


def test_padding_is_zero_after_the_prologue() -> None:
    in_bn = torch.tensor([[0.0], [1.0], [1.0], [5.0]], dtype=torch.float64)  # relu(shift) is 5, not 0
    x, w = torch.zeros(1, 1, 3, 3, dtype=torch.float64), torch.ones(1, 1, 3, 3, dtype=torch.float64)
    y, _ = reference.conv_fprop(x, w, None, None, in_bn, (1, 1), (1, 1), (1, 1), 1, False, False)
    assert y.flatten().tolist() == [20.0, 30.0, 20.0, 30.0, 45.0, 30.0, 20.0, 30.0, 20.0]
    dw = reference.conv_wgrad(x + 1, None, None, None, 0.0, x, in_bn, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert dw.flatten().tolist() == [20.0, 30.0, 20.0, 30.0, 45.0, 30.0, 20.0, 30.0, 20.0]


@pytest.mark.parametrize("batch_stats", [True, False])
@problems
def test_conv_dgrad_differentiates_bn_conv_and_relu(problem: ConvProblem, batch_stats: bool, make: Operands) -> None:
    if problem.gemm_m == 1:
        pytest.skip("BN needs more than one value")
    unit, g, size = Unit.of(make, problem, batch_stats), make.output(problem), (problem.H, problem.W)
    operands = (g, unit.z, unit.bn1, unit.sums(g), unit.inv_count, unit.w, size, *geometry(problem))
    with torch.no_grad():
        dx, prev_sums = reference.conv_dgrad(*operands, None, (1, 1), unit.u, unit.bn0)
    close(dx, unit.masked_gradient(g))
    close(prev_sums, unit.previous_sums(g))


@problems
def test_conv_dgrad_adds_a_residual_on_its_grid(problem: ConvProblem, make: Operands) -> None:
    x, w, g = make.input(problem).requires_grad_(), make.weight(problem), make.output(problem)
    (expected,) = torch.autograd.grad(F.conv2d(x, w, None, *geometry(problem)), x, g)
    for stride in ((1, 1), (2, 2), (3, 1)):
        residual = torch.randn_like(x[:, :, :: stride[0], :: stride[1]])
        spread = torch.zeros_like(x)
        spread[:, :, :: stride[0], :: stride[1]] = residual
        dx, prev_sums = reference.conv_dgrad(
            g, None, None, None, 0.0, w, x.shape[2:], *geometry(problem), residual, stride, None, None
        )
        close(dx, expected + spread)
        assert prev_sums.shape == (0,)


@pytest.mark.parametrize("batch_stats", [True, False])
@problems
def test_conv_wgrad_differentiates_bn_and_recomputes_its_input(
    problem: ConvProblem, batch_stats: bool, make: Operands
) -> None:
    unit, g = Unit.of(make, problem, batch_stats), make.output(problem)
    operands = (g, unit.z, unit.bn1, unit.sums(g), unit.inv_count)
    with torch.no_grad():
        dw = reference.conv_wgrad(*operands, unit.u, unit.bn0, (problem.R, problem.S), *geometry(problem))
    close(dw, unit.gradient(g, unit.w)[0])


@pytest.mark.parametrize("groups", [1, 3])
def test_every_entry_of_a_bfloat16_weight_gradient_is_written(groups: int) -> None:
    """Of maps narrower than the stride, where oneDNN leaves some as its memory was before."""
    x, w = torch.randn(2, 6, 7, 1).bfloat16(), torch.randn(18, 6 // groups, 3, 3).bfloat16()
    dz = torch.randn(2, 18, 4, 1).bfloat16()
    geometry = [3, 3], [2, 2], [1, 1], [1, 1], groups
    expected = reference.convolution_wgrad(dz.double(), x.double(), *geometry)
    for _ in range(20):
        for _ in range(8):
            torch.full_like(w, 1e30), torch.full((2 * w.numel(),), 1e30, dtype=w.dtype)  # what memory holds then
        found = reference.convolution_wgrad(
            *(t.contiguous(memory_format=torch.channels_last) for t in (dz, x)), *geometry
        )
        torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0.1)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_bn_finalize_moves_statistics_as_batch_norm_does(momentum: float | None, make: Operands) -> None:
    bn = torch.nn.BatchNorm2d(6, eps=1e-3, momentum=momentum, dtype=torch.float64)
    torch.nn.init.normal_(bn.weight)
    torch.nn.init.normal_(bn.bias)
    mean, var, counter = bn.running_mean.clone(), bn.running_var.clone(), bn.num_batches_tracked.clone()
    for _ in range(3):
        z = make.activation(2, 6, 3, 2) * 2 + 3
        stats = reference.channel_stats(z)
        rows = reference.bn_finalize(stats, bn.weight, bn.bias, mean, var, counter, momentum, 1e-3).detach()
        close(per_channel(rows[2]) * z + per_channel(rows[3]), bn(z).detach())
        close(rows[0], z.mean((0, 2, 3)))
        close(rows[1], (z.var((0, 2, 3), unbiased=False) + 1e-3).rsqrt())
    close(mean, bn.running_mean)
    close(var, bn.running_var)
    assert counter.item() == bn.num_batches_tracked.item() == 3


def test_bn_finalize_without_counter_or_affine_parameters(make: Operands) -> None:
    z = make.activation(2, 5, 3, 2)
    rows = reference.bn_finalize(reference.channel_stats(z), None, None, None, None, None, None, EPS)
    close(per_channel(rows[2]) * z + per_channel(rows[3]), F.batch_norm(z, None, None, None, None, True, 0.0, EPS))


def test_running_variance_is_unbiased_and_normalisation_biased() -> None:
    z = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    mean, var = torch.zeros(1), torch.ones(1)
    rows = reference.bn_finalize(reference.channel_stats(z), None, None, mean, var, torch.tensor(0), 1.0, 1e-5)
    assert (mean.item(), var.item()) == (2.0, 2.0)
    torch.testing.assert_close(rows[2] * z.flatten() + rows[3], torch.tensor([-0.999995, 0.999995]))


def test_channel_stats_survive_a_large_mean() -> None:
    z = (10000 + torch.randn(8, 4, 32, 32)).contiguous(memory_format=torch.channels_last)
    count, mean, m2 = reference.channel_stats(z)
    torch.testing.assert_close((m2 / count).double(), z.double().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), z.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("affine", [True, False])
def test_bn_constants_are_batch_norm_in_eval(affine: bool, make: Operands) -> None:
    z, mean, var = make.activation(2, 6, 3, 2), make.normal(6), make.normal(6).square()
    weight, bias = (make.normal(6), make.normal(6)) if affine else (None, None)
    rows = reference.bn_constants(mean, var, weight, bias, 0.1, torch.float64)
    close(per_channel(rows[2]) * z + per_channel(rows[3]), F.batch_norm(z, mean, var, weight, bias, False, 0.0, 0.1))


def test_bn_constants_are_computed_in_the_dtype_asked_for() -> None:
    mean, var = torch.zeros(2, dtype=torch.float16), torch.tensor([6e-8, 6e4], dtype=torch.float16)
    rows = reference.bn_constants(mean, var, None, None, 0.0, torch.float32)
    torch.testing.assert_close(rows[1], var.float().rsqrt())


@pytest.mark.parametrize("has_bias", [True, False])
@problems
def test_bn_fold_is_conv_then_bn(problem: ConvProblem, has_bias: bool, make: Operands) -> None:
    x, w, bias = make.input(problem), make.weight(problem), make.normal(problem.K) if has_bias else None
    bn = make.bn(problem.K)
    bn[2] *= -1  # weights of either sign
    folded = reference.bn_fold(w, bias, bn)
    z = F.conv2d(x, w, bias, *geometry(problem))
    close(F.conv2d(x, *folded, *geometry(problem)), per_channel(bn[2]) * z + per_channel(bn[3]))


@pytest.mark.parametrize("relu", [True, False])
def test_scale_shift_add_relu_is_the_forward_tail(relu: bool, make: Operands) -> None:
    z, r = make.activation(2, 6, 3, 2), make.activation(2, 6, 3, 2)
    bn, residual_bn = make.bn(6), make.bn(6)

    def normalised(t: Tensor, rows: Tensor) -> Tensor:
        return (t - per_channel(rows[0])) * per_channel(rows[2]) + per_channel(rows[3] + rows[0] * rows[2])

    act = F.relu if relu else lambda t: t
    close(reference.scale_shift_add_relu(z, bn, None, None, relu), act(normalised(z, bn)))
    close(reference.scale_shift_add_relu(z, bn, r, None, relu), act(normalised(z, bn) + r))
    close(
        reference.scale_shift_add_relu(z, bn, r, residual_bn, relu), act(normalised(z, bn) + normalised(r, residual_bn))
    )


@pytest.mark.parametrize("relu", [True, False])
def test_drelu_dbn_is_the_backward_of_the_tail(relu: bool, make: Operands) -> None:
    z, r, dy = (make.activation(2, 6, 3, 5) for _ in range(3))
    weight, bias, weight_r, bias_r = (make.normal(6).requires_grad_() for _ in range(4))
    n, n_r = batch_norm(z, weight, bias), batch_norm(r, weight_r, bias_r)
    before = n + n_r
    y = F.relu(before) if relu else before
    expected = torch.autograd.grad(y, (before, bias, weight, bias_r, weight_r), dy)
    operands = bn_rows(z, weight, bias), r, bn_rows(r, weight_r, bias_r)
    output = y.detach() if relu else None
    g, sums, residual_sums = reference.drelu_dbn(dy, output, z, *operands)
    close(g, expected[0])
    close(sums, torch.stack(expected[1:3]))
    close(residual_sums, torch.stack(expected[3:]))
    _, dbeta, nothing = reference.drelu_dbn(dy, output, None, None, None, None)
    close(dbeta, expected[1][None])
    assert nothing.shape == (0,)


@pytest.mark.parametrize("batch_stats", [True, False])
def test_dbn_is_the_backward_of_batch_norm(batch_stats: bool, make: Operands) -> None:
    z, g = make.activation(2, 6, 3, 5).requires_grad_(), make.activation(2, 6, 3, 5)
    weight, bias = (make.normal(6).requires_grad_() for _ in range(2))
    dz, dweight, dbias = torch.autograd.grad(batch_norm(z, weight, bias, batch_stats), (z, weight, bias), g)
    sums, bn = torch.stack([dbias, dweight]), bn_rows(z, weight, bias, batch_stats)
    close(reference.dbn(g, z.detach(), bn, sums, 1 / 30 if batch_stats else 0.0), dz)


@pointwise_problems
def test_pointwise_stats_know_the_output_before_it_exists(problem: ConvProblem, make: Operands) -> None:
    x, w, bias, in_bn = make.input(problem), make.weight(problem), make.normal(problem.K), make.bn(problem.C)
    for prologue in (None, in_bn):
        moments = reference.input_moments(x, prologue, problem.stride)
        for b in (None, bias):
            stats = reference.pointwise_stats(moments, w, b, problem.gemm_m)
            _, expected = reference.conv_fprop(x, w, b, None, prologue, *geometry(problem), False, True)
            close(stats, expected)


@pointwise_problems
def test_pointwise_gradients_need_no_output(problem: ConvProblem, make: Operands) -> None:
    unit, g = Unit.of(make, problem), make.output(problem)
    with torch.no_grad():
        moments = reference.input_moments(unit.u, unit.bn0, problem.stride)
        dbeta = g.sum((0, 2, 3))
        context = (moments, unit.w, unit.bn1)
        dw, sums = reference.pointwise_wgrad(g, dbeta, unit.u, unit.bn0, *context, unit.inv_count, problem.stride)
        dx, _ = reference.pointwise_dgrad(
            g, unit.u, unit.bn0, *context, sums, unit.inv_count, problem.stride, None, None
        )
    close(dw, unit.gradient(g, unit.w)[0])
    close(sums, unit.sums(g))
    on_grid = torch.where(unit.activated > 0, 1.0, 0.0)[:, :, :: problem.stride[0], :: problem.stride[1]]
    close(dx * on_grid, unit.masked_gradient(g)[:, :, :: problem.stride[0], :: problem.stride[1]])
    if problem.stride == (1, 1):
        with torch.no_grad():
            masked, prev_sums = reference.pointwise_dgrad(
                g, unit.u, unit.bn0, *context, sums, unit.inv_count, (1, 1), unit.u, unit.bn0
            )
        close(masked, unit.masked_gradient(g))
        close(prev_sums, unit.previous_sums(g))


@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (5, 3, 2), (3, 1, 1)], ids=str)
def test_bn_relu_maxpool_and_its_backward(pool: tuple[int, int, int], make: Operands) -> None:
    z = make.activation(2, 6, 9, 8).requires_grad_()
    weight, bias = (make.normal(6).requires_grad_() for _ in range(2))
    expected = F.max_pool2d(F.relu(batch_norm(z, weight, bias)), *pool)
    dy = torch.randn_like(expected)
    dz, dweight, dbias = torch.autograd.grad(expected, (z, weight, bias), dy)
    bn = bn_rows(z, weight, bias)
    with torch.no_grad():
        y, tap = reference.bn_relu_maxpool(z, bn, *pool)
        actual, sums = reference.bn_relu_maxpool_backward(dy, tap, z, bn, *pool, 1 / 144)
    close(y, expected.detach())
    close(actual, dz)
    close(sums, torch.stack([dbias, dweight]))


IDENTITY_BN = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64)


def test_first_of_equal_values_wins_the_pool() -> None:
    z = torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 2.0], [0.0, 0.0, 2.0]], dtype=torch.float64).view(1, 1, 3, 3)
    y, tap = reference.bn_relu_maxpool(z, IDENTITY_BN, 2, 1, 0)
    assert y.flatten().tolist() == [2, 2, 2, 2]
    assert tap.flatten().tolist() == [1, 0, 0, 0]


def test_nan_wins_the_pool_and_survives_every_relu() -> None:
    z = torch.full((1, 1, 4, 4), -1.0, dtype=torch.float64)
    z[0, 0, 1, 2] = torch.nan
    y, tap = reference.bn_relu_maxpool(z, IDENTITY_BN, 2, 2, 0)
    assert y.isnan().flatten().tolist() == [False, True, False, False]
    assert tap[0, 0, 0, 1] == 2
    assert torch.equal(reference.scale_shift_add_relu(z, IDENTITY_BN, None, None, True).isnan(), z.isnan())
    w = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    y, _ = reference.conv_fprop(z, w, None, None, None, (1, 1), (0, 0), (1, 1), 1, True, False)
    assert torch.equal(y.isnan(), z.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_activations_are_rounded_once(dtype: torch.dtype) -> None:
    make = Operands(dtype)
    z, r, bn, residual_bn = make.activation(2, 6, 3, 5), make.activation(2, 6, 3, 5), make.bn(6), make.bn(6)
    exact = reference.scale_shift_add_relu(z.double(), bn.double(), r.double(), residual_bn.double(), True)
    actual = reference.scale_shift_add_relu(z, bn, r, residual_bn, True)
    assert ((actual.double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
