"""The networks in timm's registry: import this, and ``timm.create_model("fusedres_resnet50")`` makes one.

Published weights are timm's own of the same network, by the same tags: ``"fusedres_resnet50.a1_in1k"``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from torch import nn

from fusedres.backbone import CIFAR_CFG, IMAGENET_CFG, Backbone
from fusedres.models import MODELS

PREFIX = "fusedres_"


def _is_for_cifar(name: str) -> bool:
    return name.startswith("cifar_")


def _cfgs(name: str) -> dict[str, Any]:
    """The configuration of ``name`` for every tag that timm has weights of, or the one of the images alone."""
    published = {PREFIX + tagged: cfg for tagged, cfg in get_arch_pretrained_cfgs(name).items()}
    return published or {PREFIX + name: CIFAR_CFG if _is_for_cifar(name) else IMAGENET_CFG}


def _network(
    name: str,
    *,
    num_classes: int,
    in_chans: int,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The network ``name`` with timm's options; ``kwargs`` are those of its constructor."""
    net = MODELS[name](num_classes=num_classes or 1, **kwargs)
    assert isinstance(net, Backbone)
    if in_chans != net.conv1.in_channels:
        _replace_first_conv(net, in_chans)
    if num_classes == 0 or global_pool is not None:
        net.reset_classifier(num_classes, global_pool)
    net.drop_rate = drop_rate
    return net.to(device=device, dtype=dtype)


def _replace_first_conv(net: Backbone, in_chans: int) -> None:
    old = net.conv1
    net.conv1 = nn.Conv2d(in_chans, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    maps = 4 if _is_for_cifar(name) else 5

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        network = functools.partial(_network, name)
        feature_cfg = {"out_indices": tuple(range(maps))}
        return build_model_with_cfg(network, create.__name__, pretrained, feature_cfg=feature_cfg, **kwargs)

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = MODELS[name].__doc__
    return create


default_cfgs = generate_default_cfgs({tagged: cfg for name in MODELS for tagged, cfg in _cfgs(name).items()})

globals().update({PREFIX + name: register_model(_entrypoint(name)) for name in MODELS})
