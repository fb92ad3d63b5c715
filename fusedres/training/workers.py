"""The processes of a run: what ``torchrun`` started, or one alone."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def start(device: torch.device) -> torch.device:
    """Join the processes that ``torchrun`` started, if any; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leave the group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def were_restarted() -> bool:
    """Whether ``torchrun`` started the processes anew because it had lost one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose gradients are averaged over all processes; the model itself where there is one process."""
    if count() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def total(sums: Tensor) -> Tensor:
    """The sum over all processes."""
    if count() > 1:
        dist.all_reduce(sums)
    return sums


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's running statistics, which are also those that are saved."""
    if count() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
