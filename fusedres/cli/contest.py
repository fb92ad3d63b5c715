"""The contestants of the benchmark: eager NCHW, eager channels_last and fused, of equal weights; and their measures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fusedres import measure
from fusedres.cli import networks, photo
from fusedres.cli.common import UserError

NCHW = "eager NCHW"
CHANNELS_LAST = "eager channels_last"
FUSED = "fused"
EAGER = (NCHW, CHANNELS_LAST)

TRAINING_STEP = "zero_grad, forward, cross_entropy, backward; no optimizer"


class Contest:
    """Three networks that should compute the same, on one device in one dtype."""

    def __init__(self, arch: str, memory: str, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.arch, self.memory, self.dtype, self.device, self.seed = arch, memory, dtype, device, seed
        fused = networks.build(arch, memory, seed=seed)
        networks.shake(fused, seed)
        eager, self.baseline = networks.eager_twin(arch, fused)
        self.models = {
            NCHW: copy.deepcopy(eager).to(device, dtype),
            CHANNELS_LAST: networks.place(eager, device, dtype),
            FUSED: networks.place(fused, device, dtype),
        }
        self.classes = networks.classes_of(fused)

    def inputs(self, batch: int, size: int, picture: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (batch, 3, size, size), of the picture (1, 3, size, size) or of random numbers, and targets (batch,)."""
        generator = torch.Generator().manual_seed(self.seed)
        target = torch.randint(0, self.classes, (batch,), generator=generator)
        if picture is None:
            x = torch.randn(batch, 3, size, size, generator=generator)
        else:
            x = photo.batch_of(picture, batch)
        return x.to(self.device, self.dtype), target.to(self.device)

    def try_eager(self, x: Tensor, mode: str) -> None:
        """UserError where eager PyTorch itself refuses this input: then it is no question of fusing."""
        model = self.models[NCHW].train(mode == "train")
        try:
            with torch.no_grad(), _buffers_kept(model):
                model(x)
        except (TypeError, ValueError, RuntimeError) as error:
            what = f"{self.arch} in {mode} mode refuses an input {tuple(x.shape)} {x.dtype}"
            raise UserError(f"{what}: {str(error).splitlines()[0]}") from None

    def time(
        self, mode: str, x: Tensor, target: Tensor, rounds: int, on_round: Callable[[int], object]
    ) -> dict[str, list[float]]:
        """Seconds of every call in ``mode``, "eval" or "train", the contestants taking turns."""
        calls = {}
        for name, model in self.models.items():
            model.train(mode == "train")
            calls[name] = call(mode, model, layout(name, x), target)
        return measure.interleaved(calls, rounds, self.device, warmup=2, on_round=on_round)

    def launches(self, size: int) -> list[dict[str, Any]]:
        """For a block of each kind: launches forward and backward in training, and in eval, eager and fused."""
        rows = []
        for path, x in self._block_inputs(size).items():
            fused = self.models[FUSED].get_submodule(path)
            row: dict[str, Any] = {"block": path, "kind": type(fused).__name__, "input": list(x.shape)}
            for who in (CHANNELS_LAST, FUSED):
                row[who] = _block_launches(self.models[who].get_submodule(path), x)
            rows.append(row)
        return rows

    def _block_inputs(self, size: int) -> dict[str, Tensor]:
        """The path of the first block of each kind (with a downsample, without), and what comes into it."""
        model = self.models[CHANNELS_LAST].eval()
        paths = {id(module): name for name, module in model.named_modules()}
        first: dict[bool, nn.Module] = {}
        for block in networks.blocks_of(model):
            first.setdefault(getattr(block, "downsample", None) is not None, block)
        seen: dict[str, Tensor] = {}
        hooks = [
            block.register_forward_pre_hook(lambda module, args: seen.update({paths[id(module)]: args[0].clone()}))
            for block in first.values()
        ]
        x, _ = self.inputs(2, size, None)
        with torch.no_grad():
            model(layout(CHANNELS_LAST, x))
        for hook in hooks:
            hook.remove()
        return seen

    def saved_bytes(self, x: Tensor) -> dict[str, float]:
        """Bytes kept for backward per picture of ``x``: eager, and fused in either memory mode."""
        models = {"eager": self.models[CHANNELS_LAST], self.memory: self.models[FUSED]}
        other = "standard" if self.memory == "recompute" else "recompute"
        models[other] = networks.place(networks.build(self.arch, other), self.device, self.dtype)
        x = layout(CHANNELS_LAST, x)
        return {name: measure.saved_bytes(model.train(), x) / len(x) for name, model in models.items()}


def layout(contestant: str, x: Tensor) -> Tensor:
    """``x`` in the memory format of that contestant."""
    return x if contestant == NCHW else x.contiguous(memory_format=torch.channels_last)


def call(mode: str, model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], object]:
    """An inference of ``model``, or a training step, as it is timed; ``mode``, "eval" or "train", is set already."""

    def infer() -> None:
        with torch.inference_mode():
            model(x)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(x), target).backward()

    return step if mode == "train" else infer


def _block_launches(block: nn.Module, x: Tensor) -> dict[str, int]:
    block.train()
    leaf = x.detach().clone().requires_grad_()
    training = measure.count_launches(lambda: block(leaf))
    block.zero_grad(set_to_none=True)
    block.eval()
    with torch.inference_mode():
        block(x)  # folds, once
        inference = measure.count_launches(lambda: block(x))
    return {"forward": training.forward, "backward": training.backward, "eval": inference.forward}


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass does to running statistics."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
