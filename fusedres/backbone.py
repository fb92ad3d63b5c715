"""timm's conventions: what its users ask of a network besides ``forward``. timm itself is needed for none of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedres import functional, recall
from fusedres.blocks import chain_of
from fusedres.inspection import is_transformed, plain_reason
from fusedres.layout import channels_last
from fusedres.stages import run_stage

_SHARED_CFG: dict[str, Any] = {
    "interpolation": "bilinear",
    "crop_pct": 0.875,
    "first_conv": "conv1",
    "classifier": "fc",
}

#: How images are prepared for the networks: the keys are those of timm's ``default_cfg``.
IMAGENET_CFG: dict[str, Any] = {
    **_SHARED_CFG,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "num_classes": 1000,
}
CIFAR_CFG: dict[str, Any] = {
    **_SHARED_CFG,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "num_classes": 10,
}

#: What ``reset_classifier`` takes for ``global_pool``; "" hands the map on as it is.
_POOLS: dict[str, Callable[[], nn.Module]] = {
    "avg": lambda: nn.AdaptiveAvgPool2d((1, 1)),
    "max": lambda: nn.AdaptiveMaxPool2d((1, 1)),
    "": nn.Identity,
}


#: What ``Backbone._forward_features`` is made of.
_STEPS = ("_forward_features", "_stem", "_first", "_stages", "_run")


class Backbone(nn.Module):
    """Stem (conv1 bn1 relu [maxpool]), stages (layer1, layer2, ...) and head (avgpool fc), each to be had by itself.

    A subclass makes the modules, and says with ``_add_feature`` which maps there are.
    """

    #: What ``default_cfg`` and ``pretrained_cfg`` are at first.
    cfg: ClassVar[dict[str, Any]] = IMAGENET_CFG

    conv1: nn.Conv2d
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module | None
    avgpool: nn.Module
    fc: nn.Module

    num_features: int
    num_classes: int

    def __init__(self) -> None:
        super().__init__()
        self.default_cfg = self.pretrained_cfg = dict(self.cfg)
        self.feature_info: list[dict[str, Any]] = []
        self.grad_checkpointing = False
        self.chained_blocks: bool | None = None
        self.drop_rate = 0.0
        self._global_pool = "avg"

    def _add_feature(self, module: str, channels: int, stride: int) -> None:
        """The map behind ``module``, ``stride`` times coarser than the one added before."""
        reduction = self.feature_info[-1]["reduction"] if self.feature_info else 1
        self.feature_info.append({"num_chs": channels, "reduction": reduction * stride, "module": module})

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The last layer, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another last layer, of the old one's dtype, device and mode; none (nn.Identity) for 0 classes.

        ``global_pool``: "avg", "max", "" for neither pooling nor flattening; None keeps what there is.
        """
        if global_pool is not None:
            if global_pool not in _POOLS:
                raise ValueError(f"global_pool must be one of {list(_POOLS)}, got {global_pool!r}")
            self.avgpool = _POOLS[global_pool]().train(self.training)
            self._global_pool = global_pool
        like = next(chain(self.fc.parameters(), self.parameters()))
        head = nn.Linear(self.num_features, num_classes).to(like) if num_classes > 0 else nn.Identity()
        self.fc = head.train(self.training)
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for backward, and run each block again there.

        Running statistics move once a step, as they do without (under timm's own checkpointing they move twice).
        """
        self.grad_checkpointing = enable

    def set_chained_blocks(self, enable: bool | None = True) -> None:
        """Run the blocks of a stage in common autograd Functions while training; None: on engines that gain by it.

        The backward then writes and reads the gradient between two blocks once less. A stage whose blocks are not all
        fused, or have hooks, is run block by block.
        """
        self.chained_blocks = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> the last stage's map (N, num_features, P, Q), channels_last."""
        return recall.network(self, (self,), x, self._forward_features, self._course)

    def _forward_features(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        for stage in self._stages():
            x = self._run(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map (N, num_features, P, Q) -> logits (N, num_classes), or what the last layer would be given."""
        if self._global_pool and not pre_logits and not (self.drop_rate and self.training):
            logits = functional.head(x, self.avgpool, self.fc)
            if logits is not None:
                return logits
        x = self.avgpool(x)
        if self._global_pool:
            x = torch.flatten(x, 1)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last map and those of ``feature_info``, or these alone.

        Args:
            x: (N, C, H, W).
            indices: which maps; the last n for a number n, all for None. Negative ones count from the end.
            norm: has no effect, for every map comes out of a block whose norms are inside.
            stop_early: run no stage behind the last map asked for.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"maps are NCHW, output_fmt={output_fmt!r} is not served")
        taken = _positions(indices, len(self.feature_info))
        stages = self._stages()[: max(taken) if stop_early else None]
        maps = []
        if 0 in taken:
            x = self._first(x)
            maps.append(x)
            x = x if self.maxpool is None else self.maxpool(x)
        else:
            x = self._stem(x)
        for number, stage in enumerate(stages, start=1):
            x = self._run(stage, x)
            if number in taken:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last map of ``indices``, and the head (kept on request where no stage goes).

        Returns ``indices`` as positions from the start. ``prune_norm`` has no effect, see ``forward_intermediates``.
        """
        taken = _positions(indices, len(self.feature_info))
        last = max(taken)
        dropped = range(last + 1, len(self.feature_info))
        for number in dropped:
            setattr(self, f"layer{number}", nn.Sequential())
        if last == 0:
            self.maxpool = None
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or dropped:
            self.reset_classifier(0, "")
        return taken

    def _first(self, x: Tensor) -> Tensor:
        """The first map, channels_last whatever ``x`` is, so that the network behind it stays so."""
        is_batch = isinstance(x, Tensor) and x.dim() == 4
        x = channels_last(x) if is_batch and not is_transformed() else x
        return functional.conv_bn_relu(x, self.conv1, self.bn1, self.relu)

    def _stem(self, x: Tensor) -> Tensor:
        if self.maxpool is None:
            return self._first(x)
        return functional.stem(x, self.conv1, self.bn1, self.relu, self.maxpool)

    def _stages(self) -> list[nn.Module]:
        return [getattr(self, f"layer{number}") for number in range(1, len(self.feature_info))]

    def _course(self) -> recall.Course | None:
        """The chains that ``_forward_features`` runs; None where it may run more than chains."""
        if any(getattr(type(self), name) is not getattr(Backbone, name) for name in _STEPS):
            return None
        pool = [] if self.maxpool is None else [self.maxpool]
        chains: list[recall.Modules] = [(self.conv1, self.bn1, self.relu, *pool)]
        for stage in self._stages():
            if plain_reason(stage, nn.Sequential) is not None:
                return None
            for block in stage.children():
                of_block = chain_of(block)
                if of_block is None:
                    return None
                chains.append(of_block)
        return recall.Course(chains, lambda: True)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return run_stage(stage, x, self.chained_blocks)
        for block in stage if isinstance(stage, nn.Sequential) else [stage]:
            x = _checkpointed(block, x)
        return x


def _positions(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Which of ``count`` maps ``indices`` asks for."""
    if indices is None or isinstance(indices, int):
        positions = list(range(count - (count if indices is None else indices), count))
    else:
        positions = [index + count if index < 0 else index for index in indices]
    if not positions or not all(0 <= position < count for position in positions):
        raise ValueError(f"there are {count} maps, {indices} asks for others or for none")
    return positions


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, keeping ``x`` alone for backward."""
    if torch.compiler.is_compiling():  # the compiler moves statistics once by itself, and knows no such contexts
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _still_statistics(block)))


@contextmanager
def _still_statistics(block: nn.Module) -> Iterator[None]:
    """Every BN of ``block`` that normalises with the batch still does, but moves neither statistics nor counter."""
    moving = [m for m in block.modules() if m.training and getattr(m, "track_running_stats", False) is True]
    for bn in moving:
        bn.track_running_stats = False  # type: ignore[assignment]  # a plain attribute of these modules
    try:
        yield
    finally:
        for bn in moving:
            bn.track_running_stats = True  # type: ignore[assignment]
