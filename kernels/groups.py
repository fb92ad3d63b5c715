"""Grouped convolutions as GEMMs: narrow groups are taken several at a time, their weights as a block-diagonal matrix.

A matrix instruction is at least 16 channels wide. Groups of 4 channels (ResNeXt-50 32x4d) one at a time would waste
most of it and read 8 bytes at a time; eight of them side by side waste arithmetic that is not the bottleneck, and read
whole sectors. The zeros are made where a weight tile is loaded: no packed copy exists.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedres.problem import ConvProblem

#: Channels that groups merge into.
WIDTH = 32
#: Below this many channels a tap is narrower than a load: taps and channels become one axis of the GEMM.
_FLAT_BELOW = 16


class Blocking(NamedTuple):
    """How groups are laid over tiles: ``count`` merged groups of ``c`` input and ``k`` output channels each."""

    count: int
    c: int
    k: int
    merge: int  # groups in a merged group
    group_c: int  # channels of one group
    group_k: int

    def constants(self, divides: bool) -> dict[str, int]:
        """The constants that kernels are compiled for; a group's own sizes only where one ``divides`` by them."""
        return {
            "GROUPED": self.count > 1,
            "MERGE": self.merge,
            "GROUP_C": self.group_c if divides else 0,
            "GROUP_K": self.group_k if divides else 0,
        }


def is_flat(problem: ConvProblem) -> bool:
    """Whether taps and channels are one axis of the GEMM."""
    return problem.groups == 1 and problem.C < _FLAT_BELOW and problem.R * problem.S > 1


def tile_class(op: str, problem: ConvProblem) -> tuple[int, bool]:
    """What decides the tile of a conv: the width of its gemm_n, and whether operands are read number by number."""
    blocks, flat = blocking(problem), is_flat(problem)
    odd_c, odd_k = problem.C % 16 != 0, problem.K % 16 != 0
    if op == "conv_fprop":
        return blocks.k, flat or odd_c
    if op == "conv_dgrad":
        return blocks.c, odd_c or odd_k
    return problem.R * problem.S * blocks.c if flat else blocks.c, flat or odd_c or odd_k


def blocking(problem: ConvProblem) -> Blocking:
    """Merge as many groups as fit into ``WIDTH`` channels, on the wider side of the conv."""
    groups = problem.groups
    group_c, group_k = problem.C // groups, problem.K // groups
    merge = max(1, min(groups, WIDTH // max(group_c, group_k, 1)))
    return Blocking(-(-groups // merge), merge * group_c, merge * group_k, merge, group_c, group_k)
