"""Thousands of training steps and calls, and the memory of the process sampled: what one leaves behind shows.

    python tests/soak/memory.py --steps 2000 --calls 20000

``Growth`` is what the program answers, as JSON on stdout; exit code 1 where it is more than a bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import fusedres

SAMPLES = 20
#: Resident memory comes in pages and in the allocators' own steps: a growth below this is none.
MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class Growth:
    """What ``rounds`` rounds left: tensors alive, and bytes of resident memory (the median of the last samples above
    that of the first)."""

    what: str
    rounds: int
    tensors: int
    bytes: int
    seconds: float

    @property
    def fault(self) -> str | None:
        """What grew, or None."""
        if self.tensors > 0:
            return f"{self.what}: {self.tensors} tensors more after {self.rounds} rounds"
        if self.bytes > MOST_BYTES:
            return f"{self.what}: {self.bytes / 2**20:.1f} MiB more after {self.rounds} rounds"
        return None


def resident() -> int:
    """Bytes of memory that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def watch(what: str, one_round: Callable[[int], object], rounds: int) -> Growth:
    """Run ``one_round(i)`` for i below ``rounds``, a fifth of them before the first look."""
    start = time.perf_counter()
    warmup = rounds // 5
    for i in range(warmup):
        one_round(i)
    tensors, samples = tensors_alive(), []
    for i in range(warmup, rounds):
        one_round(i)
        if (i - warmup) % max((rounds - warmup) // SAMPLES, 1) == 0:
            samples.append(resident())
    few = max(len(samples) // 4, 1)
    growth = statistics.median(samples[-few:]) - statistics.median(samples[:few])
    seconds = round(time.perf_counter() - start, 1)
    return Growth(what, rounds, tensors_alive() - tensors, int(growth), seconds)


def small_net() -> nn.Module:
    """Blocks of ours, and one converted."""
    torch.manual_seed(0)
    return nn.Sequential(
        fusedres.FusedConvBNReLU(3, 8, stride=2),
        fusedres.FusedBottleneck(8, 2),
        fusedres.FusedBasicBlock(8, 8, memory="recompute"),
        fusedres.fuse(BasicBlock(8, 8)),
    )


def training_rounds(net: nn.Module) -> Callable[[int], object]:
    """A step of SGD a round; the batch's size changes, as that of an epoch's last batch does."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    batches = [torch.randn(n, 3, 16, 16) for n in (2, 3, 4)]

    def one_round(i: int) -> None:
        optimizer.zero_grad()
        loss = net.train()(batches[i % 3]).square().mean()
        loss.backward()
        optimizer.step()
        assert loss.isfinite(), f"the loss is {loss.item()} at step {i}"

    return one_round


def serving_rounds(net: nn.Module) -> Callable[[int], object]:
    """A call in eval a round, of several sizes; now and then the weights change, as those of a running average do."""
    batches = [torch.randn(n, 3, side, side) for n, side in ((1, 16), (2, 16), (1, 17), (3, 9))]

    @torch.no_grad()
    def one_round(i: int) -> None:
        if i % 100 == 0:
            for p in net.parameters():
                p.mul_(0.9999)
        assert net.eval()(batches[i % 4]).isfinite().all()

    return one_round


def poisoned_rounds(net: nn.Module) -> Callable[[int], object]:
    """A call and a step that fail a round: NaN in the input, and an input that no conv takes."""
    nan, narrow = torch.full((2, 3, 9, 9), torch.nan), torch.zeros(2, 4, 9, 9)

    def one_round(i: int) -> None:
        y = net.eval()(nan)
        assert y.isnan().any()
        y.sum().backward()
        net.zero_grad()
        try:
            net.train()(narrow)
        except (RuntimeError, ValueError):
            return
        raise AssertionError("a batch of four channels was taken")

    return one_round


def soak(steps: int, calls: int) -> list[Growth]:
    """All kinds of rounds."""
    frozen = fusedres.freeze(small_net().requires_grad_(False))
    return [
        watch("training steps", training_rounds(small_net()), steps),
        watch("eval calls", serving_rounds(small_net()), calls),
        watch("eval calls, frozen", serving_rounds(frozen), calls // 4),
        watch("calls that fail", poisoned_rounds(small_net()), steps // 4),
        watch("models made and used", lambda i: serving_rounds(small_net())(i + 1), steps // 10),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=20000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    growths = soak(args.steps, args.calls)
    results: dict[str, Any] = {"growth": [dataclasses.asdict(growth) for growth in growths]}
    json.dump(results, sys.stdout)
    faults = [growth.fault for growth in growths if growth.fault is not None]
    print(*faults, sep="\n", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
