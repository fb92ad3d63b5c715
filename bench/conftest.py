"""What all benchmarks share: prove first, then time by a clock that waits for the device, and say what was timed.

``-m quick`` selects float32 at the smallest batch: eager against the engine that is chosen unasked, and compiled code
where it takes few seconds to compile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from contest import BATCHES, COMPILED, DEVICE, DTYPES, EAGER, ENGINES, clock, inference, step
from networks import as_maps
from torch import Tensor, nn

import fusedres
from fusedres.cli import environment
from fusedres.cli.proof import FLOAT64_BOUND
from fusedres.measure import saved_bytes
from fusedres.traffic import traffic_of

#: What is compiled in the quick selection.
QUICKLY_COMPILED = {"scale_shift_add_relu residual", "basic64", "resnet18"}
DEVICE_NAME = environment.cpu_model() if DEVICE.type == "cpu" else torch.cuda.get_device_name()
#: Pictures that a training step is proved with, in float64.
PROVED = 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.benchmark(timer=clock))
            if _is_quick(**item.callspec.params):
                item.add_marker(pytest.mark.quick)


def _is_quick(contestant: str, batch: int, dtype: str, **place: Any) -> bool:
    if batch != BATCHES[0] or dtype != next(iter(DTYPES)):
        return False
    return contestant in (EAGER, ENGINES[0]) or (
        contestant == COMPILED and not QUICKLY_COMPILED.isdisjoint(map(str, place.values()))
    )


@pytest.fixture(autouse=True)
def _engine(contestant: str) -> Iterator[None]:
    """The engine that a contestant is named after."""
    with fusedres.engine(contestant) if contestant in ENGINES else nullcontext():
        yield


@pytest.fixture
def time_call(benchmark: Any, contestant: str) -> Callable[..., None]:
    """``time_call(fn, group, rounds)``: time ``fn()`` beside the others of ``group``, with what the figure means."""

    def run(fn: Callable[[], object], group: str, rounds: int) -> None:
        benchmark.group = group
        fn()  # folds, compiles, packs: once
        benchmark.extra_info |= {"device": DEVICE_NAME, "commit": environment.commit()}
        if contestant != COMPILED:  # compiled code passes no dispatcher
            benchmark.extra_info |= traffic_of(fn)._asdict()
        benchmark.pedantic(fn, rounds=rounds, warmup_rounds=2)

    return run


@pytest.fixture
def compare(benchmark: Any, contestant: str, time_call: Callable[..., None]) -> Callable[..., None]:
    """``compare(models, x, training, group)``: prove the contestant's model equal to eager, then time it."""

    def run(models: dict[str, nn.Module], x: Tensor, training: bool, group: str) -> None:
        models = {name: model.to(DEVICE, x.dtype).train(training) for name, model in models.items()}
        if contestant in ENGINES and training:
            prove_step(models, x[:PROVED])
        model = models["fused" if contestant in ENGINES else "eager"]
        call = (step if training else inference)(torch.compile(model) if contestant == COMPILED else model, x)
        if contestant != EAGER:
            prove_output(call, models["eager"], x)
        if training and contestant != COMPILED:
            benchmark.extra_info["saved_bytes"] = saved_bytes(model, x)
        time_call(call, group, rounds=7)

    return run


def prove_output(call: Callable[[], Tensor], eager: nn.Module, x: Tensor) -> None:
    """The error of ``call()`` against float64 is at most twice eager's."""
    y = call()
    with torch.no_grad():
        exact = copy.deepcopy(eager).double()(x.double())
        oracles.assert_accurate(({"y": y}, {"y": eager(x)}, {"y": exact}))


def prove_step(models: dict[str, nn.Module], x: Tensor) -> None:
    """Gradients and running statistics agree in float64, where rounding flips no ReLU."""

    def exact(model: nn.Module) -> dict[str, Tensor]:
        model = copy.deepcopy(model).double()
        return oracles.step(as_maps(model) if hasattr(model, "fc") else model, x.double())

    oracles.assert_steps_equal(exact(models["fused"]), exact(models["eager"]), FLOAT64_BOUND)
