"""Who takes part in a benchmark here, equal twins for them, and what is timed of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fusedres import dispatch, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EAGER, COMPILED = "eager", "compile"
BATCHES = {"cpu": (1, 8), "cuda": (8, 128)}[DEVICE.type]
DTYPES = {
    "cpu": {"float32": torch.float32, "bfloat16": torch.bfloat16},
    "cuda": {"float16": torch.float16, "bfloat16": torch.bfloat16},
}[DEVICE.type]


def _engines() -> Iterable[str]:
    """Every engine that computes convolutions on this device, the one that is chosen unasked first."""
    for name in dispatch.ENGINES:
        with dispatch.engine(name):
            if dispatch.choose("conv_fprop", DEVICE.type, next(iter(DTYPES.values()))).engine.name == name:
                yield name


ENGINES = tuple(_engines())
CONTESTANTS = (EAGER, COMPILED, *ENGINES)


def clock() -> float:
    """Seconds, read once everything queued on the device has run."""
    measure.synchronize(DEVICE)
    return time.perf_counter()


def pair(eager: nn.Module, fused: nn.Module) -> dict[str, nn.Module]:
    """Both modules with the same weights and BN statistics that are not those of a fresh model, channels_last."""
    torch.manual_seed(0)
    for module in eager.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.1)
    fused.load_state_dict(copy.deepcopy(eager.state_dict()))
    return {k: m.to(memory_format=torch.channels_last) for k, m in (("eager", eager), ("fused", fused))}


def step(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """One forward and backward pass; gradients are dropped, not accumulated."""

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        y = model(x)
        y.backward(torch.ones_like(y))
        return y.detach()

    return run


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run
