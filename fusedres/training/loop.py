"""The training loop: SGD with the ResNet paper's schedule, on one process or many, resumable to the bit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, Subset

from fusedres import card
from fusedres.training import workers
from fusedres.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fusedres.training.data import Data, Pictures
from fusedres.training.history import History
from fusedres.training.schedule import learning_rate

CHECKPOINT = "checkpoint.pt"


class TrainingDiverged(Exception):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Settings:
    """What determines a run. A checkpoint is resumed only by a run of equal settings."""

    arch: str
    data: str
    image_size: int
    epochs: int
    batch: int  # of all processes together
    lr: float
    momentum: float
    weight_decay: float
    warmup: int
    seed: int
    amp: bool
    eager: bool
    memory: str

    def steps_per_epoch(self, data: Data) -> int:
        """Whole batches in the training set; what is left over waits for another epoch's order."""
        return len(data.train) // self.batch

    def total_steps(self, data: Data) -> int:
        return self.steps_per_epoch(data) * self.epochs


def _ignore(_: object) -> None:
    pass


def fit(
    model: nn.Module,
    data: Data,
    settings: Settings,
    out: Path,
    resume: bool = False,
    max_steps: int | None = None,
    loader_workers: int = 0,
    on_step: Callable[[int], object] = _ignore,
    on_epoch: Callable[[History], object] = _ignore,
) -> History:
    """Train ``model`` in place; a checkpoint in ``out`` after each epoch and at the end.

    ``max_steps`` stops after so many steps in all, wherever in an epoch that is; the schedule stays that of
    ``settings.epochs``. ``on_step(step)`` and ``on_epoch(history)`` are called on the first process only.
    CheckpointError where ``resume`` finds none, or one of other settings; TrainingDiverged where the loss is NaN.
    """
    run = _Run(model, data, settings, out, loader_workers)
    if resume:
        run.restore(load_checkpoint(out / CHECKPOINT))
    end = min(run.total_steps, max_steps or run.total_steps)
    while run.step < end:
        run.epoch(end, on_step)
        closed = run.step % run.steps_per_epoch == 0
        if closed:
            run.close_epoch()
        run.save()
        if closed and workers.is_first():
            on_epoch(run.history)
    return run.history


class _Run:
    """The state of one training run and its moves."""

    def __init__(self, model: nn.Module, data: Data, settings: Settings, out: Path, loader_workers: int) -> None:
        self.model, self.data, self.settings, self.out = model, data, settings, out
        self.device = next(model.parameters()).device
        self.parallel = workers.wrap(model, self.device)
        self.optimizer = torch.optim.SGD(
            model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp and self.device.type == "cuda")
        self.loader_workers = loader_workers
        self.sampler: DistributedSampler = DistributedSampler(
            data.train, workers.count(), workers.rank(), shuffle=True, seed=settings.seed
        )
        self.steps_per_epoch = settings.steps_per_epoch(data)
        self.total_steps = settings.total_steps(data)
        self.step = 0
        self.history = History()

    def epoch(self, end: int, on_step: Callable[[int], object]) -> None:
        """Train from where the run stands to the end of the epoch, or to step ``end``."""
        self.parallel.train()
        losses, correct, start = [], [], time.perf_counter()
        for x, target in self._batches(end):
            loss, hits = self._train_step(x, target)
            losses.append(loss)
            correct.append(hits)
            self.step += 1
            if workers.is_first():
                on_step(self.step)
        summed = workers.total(torch.stack([torch.stack(losses), torch.stack(correct)]).double())
        seconds = time.perf_counter() - start
        self.history.add_steps((summed[0] / workers.count()).tolist(), summed[1].long().tolist(), seconds)
        if not torch.isfinite(summed[0]).all():
            raise TrainingDiverged(f"the loss is no longer finite at step {self.step}; try a smaller learning rate")

    def _batches(self, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch that are still to come, on the device."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        self.sampler.set_epoch(epoch)
        self.data.train.epoch = epoch
        size = self.settings.batch // workers.count()
        last = min(self.steps_per_epoch, end - epoch * self.steps_per_epoch)
        indices = list(self.sampler)[done * size : last * size]
        yield from _loader(self.data.train, indices, size, self.device, self.loader_workers)

    def _train_step(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """One step; the loss and the number of right answers, still on the device so that nothing waits for them."""
        lr = learning_rate(self.settings.lr, self.step, self.total_steps, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with _autocast(self.device, self.settings.amp):
            logits = self.parallel(x)
            loss = cross_entropy(logits, target)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), (logits.detach().argmax(1) == target).sum()

    def close_epoch(self) -> None:
        """Evaluate on the held-out pictures and record the epoch."""
        workers.share_buffers(self.model)
        test_loss, test_accuracy = evaluate(
            self.model, self.data.test, self.settings.batch, self.settings.amp, self.loader_workers
        )
        pictures = self.steps_per_epoch * self.settings.batch
        lr = self.optimizer.param_groups[0]["lr"]
        self.history.close_epoch(self.steps_per_epoch, pictures, lr, test_loss, test_accuracy)

    def save(self) -> None:
        """Write the checkpoint, on the first process."""
        if not workers.is_first():
            return
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        state = {
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "model": described_state(self.model, self.settings, self.data),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "history": self.history.state(),
        }
        save_checkpoint(state, self.out / CHECKPOINT)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: every later step equals that of the run which wrote it."""
        try:
            self._restore(state)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
            raise CheckpointError(f"{CHECKPOINT} does not hold this training run ({reason})") from error

    def _restore(self, state: dict[str, Any]) -> None:
        asked = dataclasses.asdict(self.settings)
        for name, value in state["settings"].items():
            if value != asked.get(name):
                raise CheckpointError(f"the checkpoint was made with {name} {value}, this run has {asked.get(name)}")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        self.history = History.of(state["history"])


def described_state(model: nn.Module, settings: Settings, data: Data) -> dict[str, Any]:
    """The state_dict of ``model``, with a card of what it is and how its pictures are made."""
    state = model.state_dict()
    card.attach(card.Card(settings.arch, data.preprocessing), state)
    return state


def _autocast(device: torch.device, amp: bool) -> Any:
    """float16 on a GPU (hence the scaler), bfloat16 on a CPU."""
    return torch.autocast(device.type) if amp else nullcontext()


def _loader(
    pictures: Pictures, indices: list[int], batch: int, device: torch.device, loader_workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    loader: DataLoader = DataLoader(
        Subset(pictures, indices),
        batch,
        num_workers=loader_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader would draw its seed from the global stream
    )
    for x, target in loader:
        x = x.to(device, non_blocking=True, memory_format=torch.channels_last)
        yield x, target.to(device, non_blocking=True)


def evaluate(
    model: nn.Module, pictures: Pictures, batch: int, amp: bool = False, loader_workers: int = 0
) -> tuple[float, float]:
    """Mean loss and accuracy (0 to 1) on ``pictures``, each seen once, shared among the processes."""
    device = next(model.parameters()).device
    indices = list(range(workers.rank(), len(pictures), workers.count()))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    with torch.inference_mode():
        for x, target in _loader(pictures, indices, batch, device, loader_workers):
            with _autocast(device, amp):
                logits = model(x)
            sums[0] += cross_entropy(logits.float(), target, reduction="sum")
            sums[1] += (logits.argmax(1) == target).sum()
    loss, correct = (workers.total(sums) / len(pictures)).tolist()
    return loss, correct
