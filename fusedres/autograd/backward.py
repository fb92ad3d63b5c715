"""The backward of a chain, from its last unit to its first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedres import ops
from fusedres.autograd.unit import (
    Operand,
    Parameters,
    Saved,
    UnitNeeds,
    materialise,
    output_gradient,
    parameter_gradients,
    run_conv,
)
from fusedres.layout import channels_last
from fusedres.problem import ConvProblem, Pair
from fusedres.specs import ChainSpec, UnitTensors


class ChainBackward:
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
        dy = channels_last(dy)
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
                z, _ = run_conv(self.specs[i], unit, materialise(self._operand(i)), False)
                self.saved[i] = saved._replace(z=z)

    def _inv_count(self, i: int, g: Tensor) -> float:
        return 1 / (g.shape[0] * g.shape[2] * g.shape[3]) if self.specs[i].batch_stats else 0.0

    def _record(self, i: int, dw: Tensor | None, sums: Tensor) -> None:
        self.gradients[i] = parameter_gradients(
            self.specs[i], self.needs[i], self.parameters[i], self.saved[i].bn, dw, sums
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
        dz = output_gradient(g, z, bn, sums, self._inv_count(i, g))
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
