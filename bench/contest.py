"""The contestants of a benchmark: eager and fused twins, what they run, and the proof that both compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedres.measure import count_launches

CONTESTANTS = ("eager", "fused")


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
    return {"eager": eager.to(memory_format=torch.channels_last), "fused": fused}


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


def prove_equal(models: dict[str, nn.Module], x: Tensor) -> None:
    """The fused output's error against float64 is at most twice eager's."""
    with torch.no_grad():
        exact = copy.deepcopy(models["eager"]).double()(x.double())
        errors = {name: (copy.deepcopy(model)(x) - exact).abs().max().item() for name, model in models.items()}
    floor = torch.finfo(x.dtype).eps * exact.abs().max().item()
    assert errors["fused"] <= 2 * errors["eager"] + floor, errors


def launches_of(model: nn.Module, x: Tensor) -> int:
    """Launches of a forward pass and its backward."""
    launches = count_launches(lambda: model(x))
    return launches.forward + launches.backward
