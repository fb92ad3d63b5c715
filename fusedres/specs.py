"""What a fused chain is told: the fixed part of each conv and BN, their tensors, and how the chain ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from fusedres import dispatch, tuning
from fusedres.distributed import Group
from fusedres.problem import ConvProblem, Pair

Memory = Literal["standard", "recompute"]
Residual = Literal["none", "input", "tensor", "projection"]


def checked_memory(memory: str) -> Memory:
    """``memory``, if it is a memory mode; ValueError else."""
    if memory not in get_args(Memory):
        raise ValueError(f"memory is {' or '.join(map(repr, get_args(Memory)))}, not {memory!r}")
    return memory  # type: ignore[return-value]  # it is one of them


class UnitSpec(NamedTuple):
    """What does not change from step to step in one conv and its BN."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    batch_stats: bool  # BN normalises by this batch, else by its running statistics
    momentum: float | None
    eps: float
    sync: Group | None = None  # the processes whose batches its batch statistics are of

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


class PoolSpec(NamedTuple):
    """A square max-pool whose padding never wins."""

    kernel_size: int
    stride: int
    padding: int


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
    tunes: bool = field(default_factory=tuning.is_on)


def is_closed(unit: UnitSpec, problem: ConvProblem, element_size: int, flops_per_byte: int) -> bool:
    """Whether the unit can run, to advantage, without storing its conv's output (elements of ``element_size`` bytes).

    It must be pointwise, widen the tensor and see enough pixels to tell the moments of its input. Nor may its batch be
    part of another: the products with the moments are of this process's pixels around a mean that is not theirs.

    It pays where the traffic that it saves, a write and seven reads of the output or its gradient, takes longer than
    the products with C x C matrices: 3 C^2 FLOPs a pixel and 6 K C^2 in all (docs/calculus.md).
    """
    if not (unit.batch_stats and unit.sync is None and problem.is_pointwise and problem.K >= 2 * problem.C):
        return False
    M, C, K = problem.gemm_m, problem.C, problem.K
    return M >= 4 * C and 8 * element_size * K * M * flops_per_byte > 3 * C * C * M + 6 * K * C * C
