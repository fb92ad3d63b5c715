"""The contestants of the benchmark, of equal weights: eager in two layouts, fused, and peers; and their measures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fusedres import measure
from fusedres.cli import networks, photo
from fusedres.cli.common import UserError
from fusedres.cli.peers import PEERS, TRAIN, Run

NCHW = "eager NCHW"
CHANNELS_LAST = "eager channels_last"
FUSED = "fused"
EAGER = (NCHW, CHANNELS_LAST)

TRAINING_STEP = "zero_grad, forward, cross_entropy, backward; no optimizer"


class Contest:
    """Networks that should compute the same, on one device in one dtype: three models, and peers where invited."""

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
        self.peers: dict[str, Run] = {}
        self.left_out: dict[tuple[str, str], str] = {}  # (peer, mode) -> why

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

    def invite(self, mode: str, x: Tensor) -> None:
        """Build every peer that runs in ``mode`` on inputs like ``x``, in place of those built before."""
        self.peers = {}
        torch.compiler.reset()
        for peer in PEERS:
            reason = peer.reason(self.arch, mode, x)
            if reason is None:
                model = copy.deepcopy(self.models[CHANNELS_LAST]).train(mode == TRAIN)
                try:
                    with torch.set_grad_enabled(mode == TRAIN):
                        self.peers[peer.name] = peer.build(self.arch, model, layout(peer.name, x))
                except Exception as error:  # of another library's compiler: no reason to measure nothing
                    reason = told(error)
            if reason is not None:
                self.leave_out(peer.name, mode, reason)

    def leave_out(self, peer: str, mode: str, reason: str) -> None:
        """Let ``peer`` take no part in ``mode``."""
        self.peers.pop(peer, None)
        self.left_out[peer, mode] = reason

    def time(
        self,
        mode: str,
        x: Tensor,
        target: Tensor,
        rounds: int,
        on_round: Callable[[int], object],
        only: Sequence[str] | None = None,
    ) -> dict[str, list[float]]:
        """Seconds of every call in ``mode``, "eval" or "train", the contestants (or ``only`` some) taking turns."""
        for model in self.models.values():
            model.train(mode == TRAIN)
        runs: dict[str, Run] = {**self.models, **self.peers}
        runs = {name: run for name, run in runs.items() if only is None or name in only}
        calls = {name: call(mode, run, layout(name, x), target) for name, run in runs.items()}
        return measure.interleaved(calls, rounds, self.device, warmup=2, on_round=on_round)

    def launches(self, size: int) -> list[dict[str, Any]]:
        """For a block of each kind: launches forward and backward in training, and in eval, eager and fused."""
        x, _ = self.inputs(2, size, None)
        first: dict[bool, tuple[str, Tensor]] = {}  # with a downsample, without
        for path, block_input in self._block_inputs(x).items():
            has_downsample = getattr(self.models[FUSED].get_submodule(path), "downsample", None) is not None
            first.setdefault(has_downsample, (path, block_input))
        rows = []
        for path, block_input in first.values():
            fused = self.models[FUSED].get_submodule(path)
            row: dict[str, Any] = {"block": path, "kind": type(fused).__name__, "input": list(block_input.shape)}
            for who in (CHANNELS_LAST, FUSED):
                row[who] = _block_launches(self.models[who].get_submodule(path), block_input)
            rows.append(row)
        return rows

    def time_blocks(self, mode: str, x: Tensor, rounds: int) -> Iterator[dict[str, Any]]:
        """Every distinct block at its place in the network: how often it occurs, seconds of eager and fused calls."""
        places: dict[tuple[Any, ...], list[str]] = {}
        inputs = self._block_inputs(x)
        for path, block_input in inputs.items():
            weights = [tuple(p.shape) for p in self.models[FUSED].get_submodule(path).parameters()]
            places.setdefault((block_input.shape, *weights), []).append(path)
        for path, *others in places.values():
            calls = {}
            for who in (CHANNELS_LAST, FUSED):
                block = self.models[who].get_submodule(path).train(mode == TRAIN)
                calls[who] = _block_call(mode, block, inputs[path])
            samples = measure.interleaved(calls, rounds, self.device, warmup=2)
            yield {"block": path, "count": 1 + len(others), "input": list(inputs[path].shape), "samples_s": samples}

    def _block_inputs(self, x: Tensor) -> dict[str, Tensor]:
        """The path of every block, in order, and what comes into it where ``x`` comes into the network."""
        model = self.models[CHANNELS_LAST].eval()
        paths = {id(module): name for name, module in model.named_modules()}
        seen: dict[str, Tensor] = {}
        hooks = [
            block.register_forward_pre_hook(lambda module, args: seen.update({paths[id(module)]: args[0].clone()}))
            for block in networks.blocks_of(model)
        ]
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


def told(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


_IN_NCHW = {NCHW, *(peer.name for peer in PEERS if peer.takes_nchw)}


def layout(contestant: str, x: Tensor) -> Tensor:
    """``x`` in the memory format of that contestant."""
    return x if contestant in _IN_NCHW else x.contiguous(memory_format=torch.channels_last)


def call(mode: str, run: Run, x: Tensor, target: Tensor) -> Callable[[], object]:
    """An inference of ``run``, or a training step, as it is timed; ``mode``, "eval" or "train", is set already."""

    def infer() -> None:
        with torch.inference_mode():
            run(x)

    def step() -> None:
        assert isinstance(run, nn.Module)
        run.zero_grad(set_to_none=True)
        cross_entropy(run(x), target).backward()

    return step if mode == TRAIN else infer


def _block_call(mode: str, block: nn.Module, x: Tensor) -> Callable[[], object]:
    def infer() -> None:
        with torch.inference_mode():
            block(x)

    leaf = x.requires_grad_(mode == TRAIN)

    def step() -> None:
        block.zero_grad(set_to_none=True)
        leaf.grad = None
        y = block(leaf)
        y.backward(torch.ones_like(y))

    return step if mode == TRAIN else infer


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
