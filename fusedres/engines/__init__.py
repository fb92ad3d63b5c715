"""What an engine is: a namespace of ops, and an answer to whether it serves an op on a device in a dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusedres.problem import ConvProblem, Pair

#: ``run(x, residual) -> y`` of a chain in eval; ``residual`` is None unless the chain's shortcut is given.
EvalRun = Callable[[Tensor, Tensor | None], Tensor]

#: ``run(x) -> y`` of chains in eval, one behind another.
NetworkRun = Callable[[Tensor], Tensor]


class LiveConv(NamedTuple):
    """A conv, w (K, C/groups, R, S), and its constant BN as the modules hold them; vectors (K,), None where absent."""

    w: Tensor
    conv_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class FoldedConv(NamedTuple):
    """A conv with its BN folded in: w (K, C/groups, R, S), bias (K,) or None, in the activations' dtype."""

    w: Tensor
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


ConvT = TypeVar("ConvT", LiveConv, FoldedConv)


@dataclass(frozen=True)
class EvalChain(Generic[ConvT]):
    """A chain in eval: convs each followed by ReLU; before the last one's, the shortcut is added.

    ``identity``: the shortcut is the chain's input; ``projection``: it is this conv of the input; ``given``: a tensor
    that comes with every call. ``pool``: kernel_size, stride and padding of a square max-pool behind it all, or None.
    """

    convs: tuple[ConvT, ...]
    projection: ConvT | None
    identity: bool
    relu: bool
    pool: tuple[int, int, int] | None = None
    given: bool = False

    @property
    def all_convs(self) -> tuple[ConvT, ...]:
        """A projection's last."""
        return self.convs + (() if self.projection is None else (self.projection,))

    def input_shapes(self, x_shape: torch.Size) -> list[torch.Size]:
        """What comes into each of ``all_convs`` where ``x_shape`` comes into the chain."""
        shapes = [x_shape]
        for conv in self.convs:
            problem = ConvProblem.of(shapes[-1], conv.w, conv.stride, conv.padding, conv.dilation, conv.groups)
            shapes.append(torch.Size((problem.N, problem.K, problem.P, problem.Q)))
        return shapes[:-1] + ([] if self.projection is None else [x_shape])


class Engine:
    """The base of every engine. An op is a method (or static function) of the name it has in ``fusedres.ops``."""

    name: str
    #: Why this engine cannot be used in this installation at all; None where it can.
    missing: str | None = None
    #: Whether convs apply their prologues themselves; else the caller materialises ``relu(scale*z+shift)`` and ``dz``.
    fuses_prologue: bool = False
    #: Whether a projection in eval accumulates into the last conv of its block: ``conv_projection``, one launch.
    adds_projection: bool = False
    #: FLOPs that take as long as a byte of memory traffic. They decide which widening pointwise convs run without
    #: storing their output, through the ``pointwise_*`` ops: more arithmetic, less traffic. 0: none.
    flops_per_byte: int = 100
    #: Whether the statistics of a conv's output are a pass of their own: an engine asked for by name that has
    #: ``channel_stats`` and no convs then makes them.
    statistics_apart: bool = False
    #: Whether what its chains call is recorded and replayed (``fusedres.replay``): where the host would be late.
    replays: bool = False
    #: Whether blocks of a stage share an autograd Function unless told (``fusedres.stages``): where that was measured.
    chains_blocks: bool = False

    def rejects(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        """Why this engine does not compute ``op`` for such tensors, or None if it does."""
        raise NotImplementedError

    def only_by_name(self, device_type: str) -> str | None:
        """Why this engine serves tensors of this device only where it was asked for by name, or None."""
        return None

    def compile_live(self, chain: EvalChain[LiveConv], dtype: torch.dtype) -> EvalRun | None:
        """A way to run ``chain`` on inputs of ``dtype`` that reads every parameter at every call, or None.

        So nothing can go stale.
        """
        return None

    def folded_reason(self, chain: EvalChain[FoldedConv]) -> str | None:
        """Why ``compile_folded`` has nothing to offer for ``chain``, or None. Values of weights are not looked at."""
        w = chain.convs[0].w
        return self.rejects("conv_fprop", w.device.type, w.dtype) or "it runs a launch a conv"

    def folded_only_by_name(self, chain: EvalChain[FoldedConv]) -> str | None:
        """Why ``compile_folded`` serves ``chain`` only where this engine was asked for by name, or None."""
        return None

    def compile_folded(self, chain: EvalChain[FoldedConv], x_shape: torch.Size) -> EvalRun | None:
        """A faster way to run ``chain`` on inputs of ``x_shape`` than one ``conv_fprop`` a conv and a pool, or None.

        It serves inputs of other batch sizes as well.
        """
        return None

    def compile_network(self, chains: Sequence[EvalRun], x_shape: torch.Size) -> NetworkRun | None:
        """One call for ``chains``, as an engine compiled them, one behind another on inputs of ``x_shape``, or None."""
        return None

    def head_reason(self, w: Tensor) -> str | None:
        """Why ``head`` has nothing to offer for the weight ``w`` (F, C) of a fully connected layer, or None."""
        return "it has no kernel for the head"

    def head_only_by_name(self) -> str | None:
        """Why ``head`` serves only where this engine was asked for by name, or None."""
        return None

    def head(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """The fully connected layer of the means over each map, in one launch: x (N, C, H, W) -> (N, F)."""
        raise NotImplementedError

    def __getattr__(self, op: str) -> Callable[..., Any]:
        raise AttributeError(f"the engine {self.name!r} does not compute {op!r}")
