"""Many threads and processes at one model: each gets what it would get alone."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from networks import images, small_twins
from oracles import shake
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import BasicBlock

import fusedres

SIDE = 17
CALLS = 8


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Small problems on a busy machine wait for their second thread longer than they compute."""


def built() -> nn.Module:
    return small_twins("bottleneck", torch.float32)[0].eval()


def converted() -> nn.Module:
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1))
    return fusedres.fuse(shake(eager)).eval()


models = pytest.mark.parametrize("make", [built, converted], ids=lambda make: make.__name__)


def batch_of(n: int) -> Tensor:
    return images(n, SIDE, torch.float32, seed=n)


@torch.no_grad()
def answer(model: nn.Module, n: int) -> Tensor:
    return model(batch_of(n))


def losses(model: nn.Module, steps: int) -> Tensor:
    """Those of ``steps`` steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.train()(batch_of(2 + step % 3)).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def in_threads(functions: list[Callable[[], Any]]) -> list[Any]:
    """What the functions return that all begin at once, each in a thread of its own."""
    begin = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        begin.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


# Threads


@models
@pytest.mark.parametrize("is_frozen", [False, True], ids=["", "frozen"])
def test_eight_threads_get_the_answers_of_one(make: Callable[[], nn.Module], is_frozen: bool, engine: str) -> None:
    model = make()
    sizes = [1, 2, 3, 1, 2, 3, 1, 2]
    twin = copy.deepcopy(model)
    if is_frozen:
        fusedres.freeze(model), fusedres.freeze(twin)
    expected = {n: answer(twin, n) for n in set(sizes)}

    def serve(n: int) -> bool:
        with fusedres.engine(engine):  # preferred in this thread alone
            return all(torch.equal(answer(model, n), expected[n]) for _ in range(CALLS))

    assert in_threads([lambda n=n: serve(n) for n in sizes]) == [True] * len(sizes)


@models
def test_a_copy_answers_the_same_while_the_model_is_trained(make: Callable[[], nn.Module]) -> None:
    model = make().requires_grad_()
    served = copy.deepcopy(model)
    expected, expected_losses = answer(served, 2), losses(copy.deepcopy(model), CALLS)
    trained, *answers = in_threads(
        [lambda: losses(model, CALLS), *[lambda: [answer(served, 2) for _ in range(2 * CALLS)]] * 2]
    )
    assert torch.equal(trained, expected_losses)
    assert all(torch.equal(y, expected) for ys in answers for y in ys)


def test_models_of_eight_threads_train_as_each_alone() -> None:
    nets = [built() if i % 2 else converted() for i in range(8)]
    expected = [losses(copy.deepcopy(net), 3) for net in nets]
    found = in_threads([lambda net=net: losses(net, 3) for net in nets])
    assert all(map(torch.equal, found, expected))


def test_a_model_is_converted_in_eight_threads_at_once() -> None:
    eager = fusedres.unfuse(converted())
    expected = answer(fusedres.fuse(eager), 2)
    for fused in itertools.chain(*in_threads([lambda: [fusedres.fuse(eager) for _ in range(4)]] * 8)):
        assert fusedres.explain(fused).share == 1
        assert torch.equal(answer(fused, 2), expected)


class Slow(nn.Module):
    """Tells how many forwards of its kind ran at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        running.append(self)
        most.append(len(running))
        time.sleep(0.01)
        running.remove(self)
        return self.bn(self.conv(x))


running: list[nn.Module] = []
most: list[int] = []


def test_one_model_is_traced_after_the_other() -> None:
    most.clear()
    in_threads([lambda: fusedres.fuse(Slow())] * 4)
    assert len(most) >= 4
    assert set(most) == {1}


# Processes


def _member(model: nn.Module, results: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's other threads do not live in a forked child, in eager neither
    results.put((answer(model, 2).numpy(), losses(model, 2).numpy()))


@pytest.mark.parametrize(("method", "make"), [("fork", built), ("fork", converted), ("spawn", converted)])
def test_a_process_started_after_use_answers_and_trains_as_its_parent(
    method: str, make: Callable[[], nn.Module]
) -> None:
    model = make().requires_grad_()
    torch.set_num_threads(2)
    expected = answer(model, 2), losses(copy.deepcopy(model), 2)
    context = mp.get_context(method)
    results = context.Queue()
    child = context.Process(target=_member, args=(model, results))
    child.start()
    found = results.get(timeout=120)
    child.join()
    assert child.exitcode == 0
    assert all(torch.equal(torch.from_numpy(ours), theirs) for ours, theirs in zip(found, expected, strict=True))


class Features(Dataset):
    """What a network makes of pictures: computed where they are loaded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return answer(self.model, index + 1).flatten(1)[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_may_use_a_model(method: str) -> None:
    model = converted()
    expected = torch.stack([answer(model, n).flatten(1)[0] for n in range(1, 5)])
    loader = DataLoader(Features(model), 2, num_workers=1, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)
