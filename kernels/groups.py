"""Grouped convolutions as GEMMs: narrow groups are taken several at a time, their weights as a block-diagonal matrix.

A matrix instruction is at least 16 channels wide. Groups of 4 channels (ResNeXt-50 32x4d) one at a time would waste
most of it and read 8 bytes at a time; eight of them side by side waste arithmetic that is not the bottleneck, and read
whole sectors. The zeros are made where a weight tile is loaded: no packed copy exists.
"""

from __future__ import annotations

from typing import NamedTuple

#: Channels that groups merge into.
WIDTH = 32


class Blocking(NamedTuple):
    """How groups are laid over tiles: ``count`` merged groups of ``c`` input and ``k`` output channels each."""

    count: int
    c: int
    k: int
    merge: int  # groups in a merged group
    group_c: int  # channels of one group
    group_k: int


def blocking(channels_in: int, channels_out: int, groups: int) -> Blocking:
    """Merge as many groups as fit into ``WIDTH`` channels, on the wider side of the conv."""
    group_c, group_k = channels_in // groups, channels_out // groups
    merge = max(1, min(groups, WIDTH // max(group_c, group_k, 1)))
    return Blocking(-(-groups // merge), merge * group_c, merge * group_k, merge, group_c, group_k)
