"""The fixture of all benchmarks: prove first, then time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from contest import inference, launches_of, prove_equal, step
from torch import Tensor, nn

from fusedres.measure import saved_bytes


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    """``compare(models, contestant, x, training)``: prove equal to float64 within twice eager's error, then time."""

    def run(models: dict[str, nn.Module], contestant: str, x: Tensor, training: bool) -> None:
        for model in models.values():
            model.train(training)
        prove_equal(models, x)
        model = models[contestant]
        benchmark.extra_info["launches"] = launches_of(model, x)
        if training:
            benchmark.extra_info["saved_bytes"] = saved_bytes(model, x)
        benchmark.pedantic((step if training else inference)(model, x), rounds=7, warmup_rounds=2)

    return run
