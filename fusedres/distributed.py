"""Batch norm over the batches of many processes: whose they are, and the two sums that cross between them.

A synchronised BN costs one collective of (3, K) numbers in forward and one in backward. No count is read on the host:
local batches may differ in size from step to step, or be empty, and nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedres.layout import STAT_ROWS


class Group(NamedTuple):
    """A process group as the collectives' ops want it: they find it by its name, so that a graph can hold it."""

    name: str
    size: int


def sync_group(bn: nn.Module) -> Group | None:
    """The processes whose batches ``bn`` normalises together; None where it looks at its own alone.

    As in ``torch.nn.SyncBatchNorm``, that is so in eval, where no group was initialised and where it has one member.
    """
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    assert group is not None  # one was initialised
    size = dist.get_world_size(group)
    return Group(group.group_name, size) if size > 1 else None


def merge_stats(stats: Tensor, group: Group) -> Tensor:
    """The statistics (3, K) of the joined batch from those of every process: the same bits on each of them."""
    gathered = _collectives().all_gather_into_tensor(stats.contiguous(), group.size, group.name)
    return join_stats(_collectives().wait_tensor(gathered).view(group.size, STAT_ROWS, -1))


def join_stats(stats: Tensor) -> Tensor:
    """(parts, 3, K) -> (3, K): (count, mean, M2) of disjoint parts joined in their order (Chan et al. 1983).

    An empty part counts for nothing, whatever its mean.
    """
    counts, means, m2 = stats.unbind(1)
    count = counts.sum(0)
    mean = (counts / count.clamp_min(1) * means).sum(0)
    return torch.stack([count, mean, (m2 + counts * (means - mean).square()).sum(0)])


def mean_sums(sums: Tensor, count: int, group: Group) -> Tensor:
    """``sums`` (2, K) of all processes over the pixels of all of them, of which this one has ``count``."""
    local = torch.cat([sums, sums.new_full((1, sums.shape[1]), count)])
    total = _collectives().wait_tensor(_collectives().all_reduce(local, "sum", group.name))
    return total[:-1] / total[-1:].clamp_min(1)


def _collectives() -> torch._ops._OpNamespace:
    """The collectives that ``torch.compile`` can trace; they exist where ``torch.distributed`` does."""
    return torch.ops._c10d_functional
