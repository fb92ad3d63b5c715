"""The calculus: one autograd Function for a whole chain of conv-BN-ReLU units with a shortcut.

A BasicBlock is a chain of two units, a Bottleneck of three, a conv-BN-ReLU layer of one. Nothing normalised or activated
is kept for backward: only the chain's input and output, the convs' raw outputs ``z`` and per-channel vectors.

The last unit of a Bottleneck, and a projection shortcut, are pointwise and widen the tensor. Such a conv needs no stored
output at all: being linear, ``z - mean = W (p(x) - a_mean)``, so the statistics of its BN follow from the second moments
of its narrow input (known before it runs, hence BN, shortcut add and ReLU join its epilogue), and the BN backward needs
``z`` only in products that the narrow input gives as well. Such a unit is called *closed* here, any other *stored*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedres import dispatch, ops
from fusedres.layout import acc_dtype
from fusedres.problem import ConvProblem, Pair

Memory = Literal["standard", "recompute"]
Residual = Literal["none", "input", "tensor", "projection"]


@dataclass(frozen=True)
class UnitSpec:
    """What does not change from step to step in one conv and its BN."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    batch_stats: bool  # BN normalises by this batch, else by its running statistics
    momentum: float | None
    eps: float

    @property
    def conv(self) -> tuple[Pair, Pair, Pair, int]:
        return self.stride, self.padding, self.dilation, self.groups


class UnitTensors(NamedTuple):
    """The tensors of one conv and its BN; what a module lacks is None. Running statistics are None where BN has none
    or must not move them; with ``batch_stats`` false they are the constants."""

    w: Tensor
    conv_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


@dataclass(frozen=True)
class ChainSpec:
    """A chain: its units in order, the unit of a projection shortcut, and how the residual and the ReLU end it.

    ``residual``: "none"; "input" (an identity shortcut); "tensor" (a tensor given); "projection" (a conv and its BN).
    """

    units: tuple[UnitSpec, ...]
    projection: UnitSpec | None
    residual: Residual
    relu: bool
    memory: Memory
    engine: str | None = field(default_factory=dispatch.forced)


class Saved(NamedTuple):
    """What one unit keeps for backward: ``z`` if stored, ``moments`` if closed, neither if it is to be recomputed."""

    bn: Tensor
    z: Tensor | None
    moments: Tensor | None


class Operand(NamedTuple):
    """A conv's input ``p(x)``: with ``bn`` it is ``relu(scale*x + shift)`` and has not been materialised."""

    x: Tensor
    bn: Tensor | None


def is_closed(unit: UnitSpec, x_shape: Sequence[int], w_shape: Sequence[int]) -> bool:
    """Whether the unit runs without storing its conv's output.

    It must be pointwise, widen the tensor (then the C x C products cost less than the K x C ones they replace) and see
    enough pixels that products with the C x C moments stay small beside the conv itself.
    """
    problem = ConvProblem.of(torch.Size(x_shape), torch.Size(w_shape), *unit.conv)
    widens = problem.K >= 2 * problem.C
    return unit.batch_stats and problem.is_pointwise and widens and problem.gemm_m >= 4 * problem.C


def chain(
    spec: ChainSpec, x: Tensor, residual: Tensor | None, units: Sequence[UnitTensors], projection: UnitTensors | None
) -> Tensor:
    """Run a chain differentiably: ``x`` (N, C, H, W) -> (N, K, P, Q), both channels_last."""
    tensors = [t for unit in (*units, *([projection] if projection else [])) for t in unit]
    return ChainFunction.apply(spec, x, residual, *tensors)[0]


def _units(flat: Sequence[Tensor | None]) -> list[UnitTensors]:
    width = len(UnitTensors._fields)
    return [UnitTensors(*flat[i : i + width]) for i in range(0, len(flat), width)]


def _materialise(operand: Operand) -> Operand:
    """The operand as the engine's conv wants it: activated once, if its conv does not apply the prologue itself."""
    if operand.bn is None or dispatch.choose("conv_fprop", operand.x.device.type, operand.x.dtype).engine.fuses_prologue:
        return operand
    return Operand(ops.scale_shift_add_relu(operand.x, operand.bn, None, None, True), None)


def _bn(unit: UnitSpec, t: UnitTensors, stats: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The unit's ``bn`` (4, K): from batch statistics, moving the running ones, or from the running ones as constants."""
    if stats is None:
        assert t.running_mean is not None and t.running_var is not None
        return ops.bn_constants(t.running_mean, t.running_var, t.weight, t.bias, unit.eps, acc_dtype(dtype))
    return ops.bn_finalize(
        stats, t.weight, t.bias, t.running_mean, t.running_var, t.num_batches_tracked, unit.momentum, unit.eps
    )


def _conv(unit: UnitSpec, t: UnitTensors, a: Operand, genstats: bool) -> tuple[Tensor, Tensor]:
    return ops.conv_fprop(a.x, t.w, t.conv_bias, None, a.bn, *unit.conv, False, genstats)


def _stored_unit(unit: UnitSpec, t: UnitTensors, a: Operand) -> tuple[Tensor, Tensor]:
    """Conv and BN vectors: (z, bn)."""
    z, stats = _conv(unit, t, a, unit.batch_stats)
    return z, _bn(unit, t, stats if unit.batch_stats else None, z.dtype)


class ClosedUnit(NamedTuple):
    moments: Tensor
    bn: Tensor
    w: Tensor
    bias: Tensor


def _closed_unit(unit: UnitSpec, t: UnitTensors, a: Operand) -> ClosedUnit:
    """BN vectors and the folded conv of a closed unit, before its conv has run."""
    problem = ConvProblem.of(a.x, t.w, *unit.conv)
    moments = ops.input_moments(a.x, a.bn, unit.stride)
    bn = _bn(unit, t, ops.pointwise_stats(moments, t.w, t.conv_bias, problem.gemm_m), a.x.dtype)
    return ClosedUnit(moments, bn, *ops.bn_fold(t.w, t.conv_bias, bn))


def _projection(spec: ChainSpec, t: UnitTensors, x: Tensor) -> tuple[Saved, Tensor, Tensor | None]:
    """The projection shortcut: what it saves, and the residual with the ``bn`` that is still to be applied to it."""
    unit = spec.projection
    assert unit is not None
    if is_closed(unit, x.shape, t.w.shape):
        closed = _closed_unit(unit, t, Operand(x, None))
        residual, _ = ops.conv_fprop(x, closed.w, closed.bias, None, None, *unit.conv, False, False)
        return Saved(closed.bn, None, closed.moments), residual, None
    z, bn = _stored_unit(unit, t, Operand(x, None))
    return Saved(bn, z, None), z, bn


def _forward(
    spec: ChainSpec, x: Tensor, residual: Tensor | None, tensors: list[UnitTensors]
) -> tuple[Tensor, list[Saved]]:
    """The chain's output, and what each unit (the projection last) saves."""
    saved = []
    a = Operand(x, None)
    for unit, t in zip(spec.units[:-1], tensors, strict=False):
        z, bn = _stored_unit(unit, t, a)
        saved.append(Saved(bn, z, None))
        a = _materialise(Operand(z, bn))
    residual_bn = None
    if spec.residual == "input":
        residual = x
    elif spec.residual == "projection":
        projection_saved, residual, residual_bn = _projection(spec, tensors[-1], x)
    y, last = _last_unit(spec, tensors[len(spec.units) - 1], a, residual, residual_bn)
    saved.append(last)
    if spec.residual == "projection":
        saved.append(projection_saved)
    return y, saved


def _last_unit(
    spec: ChainSpec, t: UnitTensors, a: Operand, residual: Tensor | None, residual_bn: Tensor | None
) -> tuple[Tensor, Saved]:
    """The last conv with BN, residual and ReLU: in one op where the unit is closed, else conv and tail."""
    unit = spec.units[-1]
    if is_closed(unit, a.x.shape, t.w.shape):
        if residual is not None and residual_bn is not None:
            residual = ops.scale_shift_add_relu(residual, residual_bn, None, None, False)
        closed = _closed_unit(unit, t, a)
        y, _ = ops.conv_fprop(a.x, closed.w, closed.bias, residual, a.bn, *unit.conv, spec.relu, False)
        return y, Saved(closed.bn, None, closed.moments)
    z, bn = _stored_unit(unit, t, a)
    return ops.scale_shift_add_relu(z, bn, residual, residual_bn, spec.relu), Saved(bn, z, None)


def _keep(spec: ChainSpec, saved: list[Saved], tensors: list[UnitTensors]) -> list[Saved]:
    """What of ``saved`` survives until backward: all in "standard" mode.

    "recompute" drops what one conv brings back: the output of a pointwise first conv, of the last and of the projection.
    """
    if spec.memory == "standard":
        return saved
    last = len(spec.units) - 1
    first_kept = 1 if tensors[0].w.shape[2:] == (1, 1) else 0
    return [s if first_kept <= i < last else s._replace(z=None) for i, s in enumerate(saved)]


class ChainFunction(torch.autograd.Function):
    """``apply(spec, x, residual, *unit tensors) -> (y, *saved)``; the saved tensors are for backward alone."""

    @staticmethod
    def forward(spec: ChainSpec, x: Tensor, residual: Tensor | None, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = _units(flat)
        y, saved = _forward(spec, x, residual, tensors)
        return y, *(t for unit in _keep(spec, saved, tensors) for t in unit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        spec, x, _, *flat = inputs
        y, *saved = output
        ctx.mark_non_differentiable(*(t for t in saved if t is not None))
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        parameters = [t for unit in _units(flat) for t in unit[:3]]  # w, conv_bias, weight
        ctx.save_for_backward(x, y if spec.relu else None, *parameters, *saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        with dispatch.engine(ctx.spec.engine), torch.autocast(dy.device.type, enabled=False):
            return None, *_Backward(ctx).run(dy)


class Parameters(NamedTuple):
    w: Tensor
    conv_bias: Tensor | None
    weight: Tensor | None


class UnitNeeds(NamedTuple):
    """Which gradients of a unit somebody asked for."""

    w: bool
    conv_bias: bool
    weight: bool
    bias: bool


class _Backward:
    """Backward of one chain. ``g`` is always a masked gradient at a BN output, ``sums`` that BN's two sums."""

    def __init__(self, ctx: Any) -> None:
        self.spec: ChainSpec = ctx.spec
        self.x, self.y, *rest = ctx.saved_tensors
        self.specs = [*self.spec.units, *([self.spec.projection] if self.spec.projection else [])]
        count = len(self.specs)
        width = len(Parameters._fields)
        self.parameters = [Parameters(*rest[i : i + width]) for i in range(0, count * width, width)]
        rest = rest[count * width :]
        width = len(Saved._fields)
        self.saved = [Saved(*rest[i : i + width]) for i in range(0, count * width, width)]
        _, self.needs_x, self.needs_residual, *flat = ctx.needs_input_grad
        width = len(UnitTensors._fields)
        self.needs = [UnitNeeds(*flat[i : i + 4]) for i in range(0, count * width, width)]
        self.gradients: list[tuple[Tensor | None, ...]] = [() for _ in self.specs]

    def run(self, dy: Tensor) -> Iterator[Tensor | None]:
        """Gradients of x, of the residual, and of the tensors of every unit in order."""
        self._restore()
        main = self._stored(len(self.spec.units) - 1)
        side = self._stored(-1) if self.spec.residual == "projection" else (None, None)
        g, sums, side_sums = ops.drelu_dbn(dy, self.y, *main, *side)
        residual_gradient = g if self.needs_residual else None
        shortcut, shortcut_stride = self._shortcut_gradient(g, sums, side_sums)
        dx = self._chain_gradient(g, sums, shortcut, shortcut_stride)
        yield dx
        yield residual_gradient
        for gradients in self.gradients:
            yield from gradients
            yield from (None,) * (len(UnitTensors._fields) - len(gradients))

    def _stored(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        """(z, bn) of a stored unit, whose sums the backward tail takes along; nothing of a closed one."""
        saved = self.saved[i]
        return (None, None) if saved.z is None else (saved.z, saved.bn)

    def _operand(self, i: int) -> Operand:
        """The input of unit ``i`` of the chain."""
        if i == 0 or i == len(self.spec.units):  # the projection reads the chain's input too
            return Operand(self.x, None)
        previous = self.saved[i - 1]
        assert previous.z is not None
        return Operand(previous.z, previous.bn)

    def _restore(self) -> None:
        """Recompute every dropped ``z``, the first unit's before the last one that reads it."""
        for i, saved in enumerate(self.saved):
            if saved.z is None and saved.moments is None:
                unit = UnitTensors(self.parameters[i].w, self.parameters[i].conv_bias, *(None,) * 5)
                z, _ = _conv(self.specs[i], unit, _materialise(self._operand(i)), False)
                self.saved[i] = saved._replace(z=z)

    def _inv_count(self, i: int, g: Tensor) -> float:
        return 1 / (g.shape[0] * g.shape[2] * g.shape[3]) if self.specs[i].batch_stats else 0.0

    def _record(self, i: int, dw: Tensor | None, sums: Tensor) -> None:
        """Gradients of unit ``i`` in the order of UnitTensors. BN's mean absorbs a conv bias, its constants do not."""
        needs, (w, conv_bias, weight) = self.needs[i], self.parameters[i]
        dbeta, dgamma = sums.unbind(0)
        d_conv_bias = None
        if needs.conv_bias and conv_bias is not None:
            scale = self.saved[i].bn[2]
            d_conv_bias = torch.zeros_like(conv_bias) if self.specs[i].batch_stats else (scale * dbeta).to(conv_bias.dtype)
        affine = w.dtype if weight is None else weight.dtype
        self.gradients[i] = (
            dw if needs.w else None,
            d_conv_bias,
            dgamma.to(affine) if needs.weight else None,
            dbeta.to(affine) if needs.bias else None,
        )

    def _shortcut_gradient(self, g: Tensor, sums: Tensor, side_sums: Tensor) -> tuple[Tensor | None, Pair]:
        """The gradient that reaches ``x`` by a projection, and on which grid of pixels it lies."""
        if self.spec.residual != "projection":
            return g if self.spec.residual == "input" else None, (1, 1)
        i = len(self.specs) - 1
        unit, w = self.specs[i], self.parameters[i].w
        problem = ConvProblem.of(self.x, w, *unit.conv)
        if self.saved[i].moments is not None:
            return self._closed_backward(i, g, sums[0], self.needs_x)[0], unit.stride
        if problem.is_pointwise:  # only the pixels that the conv reads have a gradient
            return self._stored_backward(i, g, side_sums, self.needs_x, compact=True)[0], unit.stride
        return self._stored_backward(i, g, side_sums, self.needs_x)[0], (1, 1)

    def _chain_gradient(self, g: Tensor, sums: Tensor, shortcut: Tensor | None, shortcut_stride: Pair) -> Tensor | None:
        """From the last unit to the first; dx, or None where nobody needs it."""
        for i in reversed(range(len(self.spec.units))):
            wanted = i > 0 or self.needs_x
            if self.saved[i].moments is not None:
                dx, prev_sums = self._closed_backward(i, g, sums[0], wanted)
                if i == 0 and dx is not None:
                    dx = self._on_input_grid(dx, i, shortcut, shortcut_stride)
            else:
                dx, prev_sums = self._stored_backward(i, g, sums, wanted, shortcut if i == 0 else None, shortcut_stride)
            if dx is None:
                return None
            g, sums = dx, prev_sums
        return g

    def _on_input_grid(self, dx: Tensor, i: int, shortcut: Tensor | None, shortcut_stride: Pair) -> Tensor:
        """A single closed unit's ``dx`` lies on its output grid: spread it, and add the shortcut's gradient."""
        stride = self.specs[i].stride
        if stride == (1, 1) and shortcut is None:
            return dx
        full = torch.zeros_like(self.x)
        full[:, :, :: stride[0], :: stride[1]] += dx
        if shortcut is not None:
            full[:, :, :: shortcut_stride[0], :: shortcut_stride[1]] += shortcut
        return full

    def _closed_backward(self, i: int, g: Tensor, sum_g: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor]:
        a, (bn, _, moments) = self._operand(i), self.saved[i]
        w, unit, inv_count = self.parameters[i].w, self.specs[i], self._inv_count(i, g)
        assert moments is not None
        dw, sums = ops.pointwise_wgrad(g, sum_g, a.x, a.bn, moments, w, bn, inv_count, unit.stride)
        self._record(i, dw, sums)
        if not wanted:
            return None, sums
        previous = (a.x, a.bn) if a.bn is not None else (None, None)
        return ops.pointwise_dgrad(g, a.x, a.bn, moments, w, bn, sums, inv_count, unit.stride, *previous)

    def _stored_backward(
        self,
        i: int,
        g: Tensor,
        sums: Tensor,
        wanted: bool,
        shortcut: Tensor | None = None,
        shortcut_stride: Pair = (1, 1),
        compact: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        a, (bn, z, _), w, unit = self._operand(i), self.saved[i], self.parameters[i].w, self.specs[i]
        assert z is not None
        dz = self._output_gradient(g, z, bn, sums, self._inv_count(i, g))
        dw = None
        if self.needs[i].w:
            dw = ops.conv_wgrad(*dz, a.x, a.bn, w.shape[2:], *unit.conv)
        self._record(i, dw, sums)
        if not wanted:
            return None, sums
        size = g.shape[2:] if compact else a.x.shape[2:]
        stride = (1, 1) if compact else unit.stride
        previous = (a.x, a.bn) if a.bn is not None else (None, None)
        return ops.conv_dgrad(
            *dz, w, size, stride, unit.padding, unit.dilation, unit.groups, shortcut, shortcut_stride, *previous
        )

    @staticmethod
    def _output_gradient(
        g: Tensor, z: Tensor, bn: Tensor, sums: Tensor, inv_count: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
        """``dz`` as the first five arguments of conv_dgrad and conv_wgrad: lazily, or materialised for both at once."""
        if dispatch.choose("conv_dgrad", g.device.type, g.dtype).engine.fuses_prologue:
            return g, z, bn, sums, inv_count
        return ops.dbn(g, z, bn, sums, inv_count), None, None, None, 0.0
