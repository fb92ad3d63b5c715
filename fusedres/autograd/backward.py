"""The backward of a chain, from its last unit to its first, and on into the chain before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres import ops
from fusedres.autograd.needs import ChainNeeds
from fusedres.autograd.unit import (
    Operand,
    OutputGradient,
    ParameterDtypes,
    Saved,
    inv_count,
    materialise,
    output_gradient,
    parameter_gradients,
    run_conv,
)
from fusedres.layout import add_on_grid_, channels_last
from fusedres.problem import Pair
from fusedres.specs import ChainSpec, UnitTensors


def chain_backward(
    spec: ChainSpec,
    needs: ChainNeeds,
    input_size: torch.Size,
    dtypes: tuple[ParameterDtypes, ...],
    dy: Tensor,
    *saved: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, of the residual, and of the tensors of every unit in order, from that of the output and what the
    forward saved."""
    chain = ChainBackward(spec, needs, input_size, dtypes, saved)
    tail = chain.tail(dy)
    dx, _ = chain.run(tail, None)
    return dx, tail.g if needs.residual else None, *chain.unit_gradients()


class Tail(NamedTuple):
    """What the backward tail gives: the masked gradient at the last BN's output, that BN's sums, and a projection's."""

    g: Tensor
    sums: Tensor
    side_sums: Tensor


class TailOperands(NamedTuple):
    """What the backward tail of a chain reads: its output, and (z, bn) of the last unit and of a projection."""

    y: Tensor | None
    z: Tensor | None
    bn: Tensor | None
    side_z: Tensor | None
    side_bn: Tensor | None


class ChainBackward:
    """Backward of one chain. ``g`` is always a masked gradient at a BN output, ``sums`` that BN's two sums."""

    def __init__(
        self,
        spec: ChainSpec,
        needs: ChainNeeds,
        input_size: torch.Size,
        dtypes: tuple[ParameterDtypes, ...],
        saved: Sequence[Tensor | None],
    ) -> None:
        self.spec, self.needs, self.input_size, self.dtypes = spec, needs, input_size, dtypes
        self.x, self.y, *rest = saved
        self.specs = [*self.spec.units, *([self.spec.projection] if self.spec.projection else [])]
        count = len(self.specs)
        width, parameters = len(Saved._fields), rest[: 2 * count]
        self.saved = [Saved(*rest[i : i + width]) for i in range(2 * count, len(rest), width)]
        self.weights = [own if s.w is None else s.w for own, s in zip(parameters[::2], self.saved, strict=True)]
        self.conv_biases = [
            own if s.conv_bias is None else s.conv_bias for own, s in zip(parameters[1::2], self.saved, strict=True)
        ]
        self.gradients: list[tuple[Tensor | None, ...]] = [() for _ in self.specs]

    def tail(self, dy: Tensor) -> Tail:
        """From the gradient of the chain's output."""
        return Tail(*ops.drelu_dbn(channels_last(dy), *self.tail_operands()))

    def tail_operands(self) -> TailOperands:
        """Those of ``tail``, for whoever computes it on the way."""
        self._restore()
        main = self._stored(len(self.spec.units) - 1)
        side = self._stored(-1) if self.spec.residual == "projection" else (None, None)
        return TailOperands(self.y, *main, *side)

    def run(self, tail: Tail, before: TailOperands | None) -> tuple[Tensor | None, Tail | None]:
        """(the gradient of x, None), or where x is the output of the chain ``before``, (None, that chain's tail).

        Both None where nobody needs the gradient of x.
        """
        shortcut, shortcut_stride = self._shortcut_gradient(*tail)
        return self._chain_gradient(tail.g, tail.sums, shortcut, shortcut_stride, before)

    def unit_gradients(self) -> list[Tensor | None]:
        """Gradients of the tensors of every unit in order, once all has run."""
        absent = len(UnitTensors._fields)
        return [t for unit in self.gradients for t in (*unit, *(None,) * (absent - len(unit)))]

    def _stored(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        """(z, bn) of a stored unit, whose sums the backward tail takes along; nothing where they are not needed."""
        saved = self.saved[i]
        is_summed = saved.z is not None and self.needs.units[i].sums(self.specs[i])
        return (saved.z, saved.bn) if is_summed else (None, None)

    def _operand(self, i: int) -> Operand:
        """The input of unit ``i`` of the chain."""
        if i == 0 or i == len(self.spec.units):  # the projection reads the chain's input too
            assert self.x is not None
            return Operand(self.x, None)
        previous = self.saved[i - 1]
        assert previous.z is not None
        return Operand(previous.z, previous.bn)

    def _restore(self) -> None:
        """Recompute every dropped ``z`` that is read, the first unit's before the last one that reads it."""
        for i, (saved, kept) in enumerate(zip(self.saved, self.needs.kept, strict=True)):
            if kept.again and saved.moments is None:
                w = self.weights[i]
                assert w is not None
                unit = UnitTensors(w, self.conv_biases[i], *(None,) * 5)
                z, _ = run_conv(self.specs[i], unit, materialise(self._operand(i)), False)
                self.saved[i] = saved._replace(z=z)

    def _record(self, i: int, dw: Tensor | None, sums: Tensor) -> None:
        bn = self.saved[i].bn
        assert bn is not None
        self.gradients[i] = parameter_gradients(self.specs[i], self.needs.units[i], bn, dw, sums, self.dtypes[i])

    def _shortcut_gradient(self, g: Tensor, sums: Tensor, side_sums: Tensor) -> tuple[Tensor | None, Pair]:
        """The gradient that reaches ``x`` by a projection, and on which grid of pixels it lies."""
        if self.spec.residual != "projection":
            return g if self.spec.residual == "input" else None, (1, 1)
        i = len(self.specs) - 1
        unit = self.specs[i]
        if not self.needs.units[i].any:
            return None, (1, 1)
        if self.saved[i].moments is not None:
            return self._closed_backward(i, g, sums[0])[0], unit.stride
        # The sums of a BN that needs no dgamma were not taken along: dbeta is the main branch's, for g is the same.
        side_sums = side_sums if side_sums.numel() else sums[:1]
        if unit.groups == 1 and self._is_pointwise(i):  # only the pixels that the conv reads have a gradient
            return self._stored_backward(i, g, side_sums, compact=True)[0], unit.stride
        return self._stored_backward(i, g, side_sums)[0], (1, 1)

    def _chain_gradient(
        self, g: Tensor, sums: Tensor, shortcut: Tensor | None, shortcut_stride: Pair, before: TailOperands | None
    ) -> tuple[Tensor | None, Tail | None]:
        """From the last unit to the first, as far as somebody needs it, and on: as ``run`` returns it."""
        dx: Tensor | None
        for i in reversed(range(len(self.spec.units))):
            if not self.needs.units[i].any:
                return None, None
            if self.saved[i].moments is not None:
                dx, sums = self._closed_backward(i, g, sums[0])
                if i == 0 and dx is not None:
                    dx = self._on_input_grid(dx, i, shortcut, shortcut_stride)
            elif i == 0 and before is not None and shortcut is not None and shortcut_stride == (1, 1):
                return None, self._over_the_border(g, sums, shortcut, before)
            else:
                dx, sums = self._stored_backward(i, g, sums, shortcut if i == 0 else None, shortcut_stride)
            if dx is None:
                return None, None
            g = dx
        return (g, None) if before is None else (None, Tail(*ops.drelu_dbn(g, *before)))

    def _over_the_border(self, g: Tensor, sums: Tensor, shortcut: Tensor, before: TailOperands) -> Tail | None:
        """The first unit's backward, and in its epilogue the tail of the chain before."""
        dz = self._weight_gradient(0, g, sums)
        w, unit = self.weights[0], self.specs[0]
        if dz is None:
            return None
        assert w is not None
        assert before.y is not None
        return Tail(*ops.conv_dgrad_drelu_dbn(*dz, w, self.input_size, *unit.conv, shortcut, *before))

    def _on_input_grid(self, dx: Tensor, i: int, shortcut: Tensor | None, shortcut_stride: Pair) -> Tensor:
        """A single closed unit's ``dx`` lies on its output grid: spread it, and add the shortcut's gradient."""
        stride = self.specs[i].stride
        if stride == (1, 1) and shortcut is None:
            return dx
        assert self.x is not None
        full = torch.zeros_like(self.x)
        add_on_grid_(full, dx, stride)
        if shortcut is not None:
            add_on_grid_(full, shortcut, shortcut_stride)
        return full

    def _closed_backward(self, i: int, g: Tensor, sum_g: Tensor) -> tuple[Tensor | None, Tensor]:
        """(the gradient of the unit's input or None, the sums of the BN before it)."""
        (bn, _, moments, *_), w, unit = self.saved[i], self.weights[i], self.specs[i]
        a = self._operand(i)
        if self.needs.units[i].input:  # both products read it
            a = materialise(a)
        assert bn is not None
        assert moments is not None
        assert w is not None
        count = inv_count(unit, g)
        dw, sums = ops.pointwise_wgrad(g, sum_g, a.x, a.bn, moments, w, bn, count, unit.stride)
        self._record(i, dw, sums)
        if not self.needs.units[i].input:
            return None, sums
        return ops.pointwise_dgrad(g, a.x, a.bn, moments, w, bn, sums, count, unit.stride, *self._previous(i))

    def _stored_backward(
        self,
        i: int,
        g: Tensor,
        sums: Tensor,
        shortcut: Tensor | None = None,
        shortcut_stride: Pair = (1, 1),
        compact: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """(the gradient of the unit's input or None, the sums of the BN before it). ``compact``: on the output grid."""
        dz = self._weight_gradient(i, g, sums)
        if dz is None:
            return None, sums
        w, unit = self.weights[i], self.specs[i]
        assert w is not None
        previous = self._previous(i)
        size = g.shape[2:] if compact else self.input_size if previous[0] is None else previous[0].shape[2:]
        stride = (1, 1) if compact else unit.stride
        return ops.conv_dgrad(
            *dz, w, size, stride, unit.padding, unit.dilation, unit.groups, shortcut, shortcut_stride, *previous
        )

    def _weight_gradient(self, i: int, g: Tensor, sums: Tensor) -> OutputGradient | None:
        """A stored unit's parameter gradients, recorded; the gradient of its conv's output where its input needs it."""
        (bn, z, *_), w, unit, needs = self.saved[i], self.weights[i], self.specs[i], self.needs.units[i]
        if not needs.dz:
            self._record(i, None, sums)
            return None
        assert bn is not None
        assert w is not None
        dz = output_gradient(unit, g, z, bn, sums)
        dw = None
        if needs.w:
            a = self._operand(i)
            dw = ops.conv_wgrad(*dz, a.x, a.bn, w.shape[2:], *unit.conv)
        self._record(i, dw, sums)
        return dz if needs.input else None

    def _previous(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        """The ``z`` and ``bn`` that a ReLU made into the input of unit ``i``; nothing where that is the chain's."""
        if i in (0, len(self.spec.units)):
            return None, None
        return self.saved[i - 1].z, self.saved[i - 1].bn

    def _is_pointwise(self, i: int) -> bool:
        w = self.weights[i]
        return w is not None and w.shape[2:] == (1, 1) and self.specs[i].padding == (0, 0)
