"""The plans of a network by name: eager, one launch a fused conv, one launch a block; with its layers' bounds."""

from __future__ import annotations

import torch
from torch import nn

from fusedres import dispatch, plan
from fusedres.cli import networks
from fusedres.plan import Launch

EAGER, CONV, BLOCK = MODES = ("eager", "conv", "block")
MODE_TEXT = {
    EAGER: "every module a launch of its own",
    CONV: "as the dispatcher plans it: a launch a conv, with its prologue and epilogue",
    BLOCK: "the same, if a block's forward, and its backward, were one launch each",
}


class Planner:
    """Plans one network on one kind of device, in one dtype, in eval or training."""

    def __init__(self, arch: str, memory: str, dtype: torch.dtype, device_type: str, training: bool) -> None:
        self.arch, self.memory, self.dtype, self.device_type, self.training = arch, memory, dtype, device_type, training

    def plan(self, mode: str, batch: int, size: int) -> list[Launch]:
        """The launches for ``batch`` pictures of ``size`` x ``size``."""
        meta = torch.device("meta")
        with meta:
            model: nn.Module = networks.build(self.arch, self.memory)
            if mode == EAGER:
                model, _ = networks.eager_twin(self.arch, model)
        model = networks.place(model, meta, self.dtype)
        x = torch.empty(batch, 3, size, size, dtype=self.dtype, device=meta)
        target = torch.empty(batch, dtype=torch.long, device=meta) if self.training else None
        blocks = set(networks.blocks_of(model))
        layers = {name: module for name, module in model.named_modules() if module in blocks}
        with dispatch.meta_as(self.device_type):
            launches = plan.walk(model, layers, x.to(memory_format=torch.channels_last), target)
        return plan.fuse(launches, _by_layer) if mode == BLOCK else launches

    def engine(self) -> dispatch.Choice:
        """The engine of the convolutions, and why others were passed over."""
        return dispatch.choose("conv_fprop", self.device_type, self.dtype)


def _by_layer(launch: Launch) -> tuple[str, str] | None:
    return None if launch.layer == plan.HEAD else (launch.layer, launch.phase)
