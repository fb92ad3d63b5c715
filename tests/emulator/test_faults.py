"""Faults planted in every CUDA kernel, one at a time: the race detector or the comparison with eager catches each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import emulated
import emulated_tails
import pytest
import torch
from geometries import assert_close_as_eager, batch, eager_block, eager_cifar_stem, eager_head, eager_stem, fold, folded
from torch import Tensor, nn

from fusedres import reference
from fusedres.engines.block_kernels import stem_weight

F16 = torch.float16
Kernel = Callable[[Any], tuple[Tensor, dict[str, Any]]]


class Problem:
    """A call of a kernel, what its tests ask of the result, and the barriers, waits, fences and views that it calls."""

    def __init__(self, check: Callable[[Tensor], None], kernel: Kernel) -> None:
        self.check, self.kernel = check, kernel
        self.calls: dict[int, str] = self.run()[1]["calls"]

    def run(self, racecheck: bool = True, **faults: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.kernel(emulated.options(racecheck=racecheck, workers=1, **faults))

    def hazard(self, **fault: Any) -> str | None:
        """What the race detector says of ``fault``."""
        try:
            self.run(**fault)
        except RuntimeError as error:
            return str(error)
        return None

    def is_wrong(self, **fault: Any) -> bool:
        """Whether ``fault`` is an error or makes the result less accurate than the kernel's tests allow."""
        try:
            self.check(self.run(**fault)[0])
        except (RuntimeError, AssertionError):
            return True
        return False


def eval_problem(eager: nn.Module, x: Tensor, kernel: Kernel) -> Problem:
    return Problem(lambda y: assert_close_as_eager(y, eager, x), kernel)


def block(kind: str, tile: int, c: int, planes: int, stride: int, h: int, w: int) -> Problem:
    eager, x = eager_block(kind, c, planes, stride, F16), batch(1, c, h, w, dtype=F16)
    convs, w_shortcut = folded(eager, F16)
    kernel = emulated.bottleneck_fprop if kind == "bottleneck" else emulated.basic_block_fprop
    return eval_problem(eager, x, lambda options: kernel(x, convs, w_shortcut, stride, options, tile))


def stem(make: Callable[..., nn.Sequential], k: int, h: int, w: int) -> Problem:
    eager, x = make(3, k, F16), batch(1, 3, h, w, dtype=F16)
    with torch.no_grad():
        weight, bias = fold(eager[0], eager[1], F16)
    return eval_problem(eager, x, lambda options: emulated.stem_fprop(x, stem_weight(weight), bias, options))


def head(n: int, c: int, f: int) -> Problem:
    eager, x = eager_head(c, f, F16), batch(n, c, 2, 3, dtype=F16)
    return eval_problem(eager, x, lambda options: emulated.head_fprop(x, eager[2].weight, eager[2].bias, options))


def flat(*tensors: Tensor) -> Tensor:
    return torch.cat([t.float().flatten() for t in tensors])


def tail(op: str, *operands: Tensor | None) -> Problem:
    """Of the op of that name in a training step; its results in a row."""

    def results(module: Any, **options: Any) -> Tensor:
        result = getattr(module, op)(*operands, **options)
        return flat(*result) if isinstance(result, tuple) else flat(result)

    def kernel(options: Any) -> tuple[Tensor, dict[str, Any]]:
        totals: emulated_tails.Totals = []
        y = results(emulated_tails, run=options, totals=totals)
        return y, totals[0]

    expected = results(reference)
    return Problem(lambda y: torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3), kernel)


def backward_tail(c: int) -> Problem:
    dy, y, z, residual_z = (batch(2, c, 9, 7, dtype=F16) for _ in range(4))
    bn, residual_bn = torch.rand(4, c) + 0.5, torch.rand(4, c) + 0.5
    return tail("drelu_dbn", dy, y, z, bn, residual_z, residual_bn)


def statistics(c: int) -> Problem:
    return tail("channel_stats", batch(2, c, 9, 7, dtype=F16))


#: By kernel as it is compiled: problems that take all of its paths together. Both shortcuts, several passes over the
#: output channels, an odd number of steps and an even one, a whole tile and a ragged one.
KERNELS: dict[str, list[Callable[[], Problem]]] = {
    **{
        f"bottleneck stride {stride} tile {tile}": [
            functools.partial(block, "bottleneck", tile, 72, 72, stride, 9, 17),
            functools.partial(block, "bottleneck", tile, 32, 8, stride, 17, 17),
        ]
        for stride, tile in itertools.product((1, 2), (0, 1))
    },
    **{
        f"basic block tile {tile}": [
            functools.partial(block, "basic", tile, 72, 72, 1, 9, 17),
            functools.partial(block, "basic", tile, 8, 72, 2, 17, 33),
        ]
        for tile in (0, 1)
    },
    "stem": [functools.partial(stem, eager_stem, 72, 19, 35)],
    "CIFAR stem, narrow": [functools.partial(stem, eager_cifar_stem, 24, 9, 33)],
    "CIFAR stem, wide": [functools.partial(stem, eager_cifar_stem, 72, 9, 33)],
    "head, few images": [functools.partial(head, 17, 264, 33), functools.partial(head, 2, 600, 17)],
    "head, many images": [functools.partial(head, 70, 264, 37)],
}


#: Those that have no tiles of matrices.
TAILS: dict[str, list[Callable[[], Problem]]] = {
    f"{kernel.__name__}, {'vectors' if c % 8 == 0 else 'channels'}": [functools.partial(kernel, c)]
    for kernel, c in itertools.product((backward_tail, statistics), (24, 7))
}


@pytest.fixture(scope="module", params=KERNELS)
def problems(request: pytest.FixtureRequest) -> list[Problem]:
    return [make() for make in KERNELS[request.param]]


@pytest.fixture(scope="module", params=KERNELS | TAILS)
def all_problems(request: pytest.FixtureRequest) -> list[Problem]:
    return [make() for make in (KERNELS | TAILS)[request.param]]


def calls(problems: list[Problem], *kinds: str) -> list[tuple[int, str]]:
    """Those of some kinds, in the order of the machine code."""
    found = {call: kind for problem in problems for call, kind in problem.calls.items() if kind in kinds}
    return sorted(found.items())


def test_without_a_fault_all_is_well(all_problems: list[Problem]) -> None:
    for problem in all_problems:
        assert not problem.is_wrong()
        assert torch.equal(problem.run()[0], problem.run(racecheck=False)[0])


def test_every_barrier_wait_and_fence_is_missed(all_problems: list[Problem]) -> None:
    """Each left out makes a hazard in one of the all_problems: none is there in vain."""
    dropped = calls(all_problems, "barrier", "wait", "fence")
    assert dropped
    for number, (call, kind) in enumerate(dropped):
        messages = [problem.hazard(drop=call) or "nothing" for problem in all_problems if call in problem.calls]
        found = ("racecheck: block", "deadlock")  # the latter where one thread alone comes by a copy of the call
        assert any(word in message for message in messages for word in found), (number, kind, messages)


def test_every_access_one_row_or_element_further_on_shows(problems: list[Problem]) -> None:
    shifted = calls(problems, "view")
    assert shifted
    for number, (call, _) in enumerate(shifted):
        assert any(problem.is_wrong(shift=call) for problem in problems if call in problem.calls), number


@pytest.mark.parametrize(
    "swapped",
    [*itertools.combinations(range(4), 2), (4, 5), *itertools.combinations(range(6, 10), 2)],
    ids=lambda pair: "{}{}".format(*pair),
)
def test_swapped_fragment_registers_show(problems: list[Problem], swapped: tuple[int, int]) -> None:
    """Of A (0 to 3), of B (4, 5), of the accumulators (6 to 9)."""
    assert problems[0].is_wrong(racecheck=False, swap_registers=swapped)
