"""A launch that was made before goes past Triton's own look for its kernel, and no other does."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedres.kernels import launch
from fusedres.kernels.launch import Boxes


class Kernel:
    """Stands in for a jitted function: notes each look for a kernel, and each launch of what it found."""

    arg_names = ("x", "residual", "count", "scale", "BLOCK", "FLAG")

    def __init__(self) -> None:
        self.looks: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []

    def fn(self) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def look(*args: Any, **constants: Any) -> Compiled:
            self.looks.append((grid, args, constants))
            return Compiled(self)

        return look


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.launches.append((grid, args))


@pytest.fixture
def kernel() -> Any:
    kernel = Kernel()
    kernel.fn = kernel.fn  # type: ignore[method-assign]  # one object, as a jitted function's is
    with mock.patch.object(launch, "_compiled", {}):
        yield kernel


def run(kernel: Kernel, x: Tensor, residual: Tensor | None = None, count: int = 7, scale: float = 0.5) -> None:
    launch.run(kernel, (3, 2), x, residual, count, scale, num_warps=4, FLAG=True, BLOCK=64)


def test_the_second_launch_is_direct_with_its_own_tensors_and_numbers(kernel: Kernel) -> None:
    first, second = torch.zeros(64), torch.ones(64)
    run(kernel, first)
    run(kernel, second, scale=0.25)
    assert len(kernel.looks) == 1
    assert kernel.launches == [((3, 2, 1), (second, None, 7, 0.25, 64, True))]


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(64, dtype=torch.float16)},
        {"x": torch.zeros(65)[1:]},  # no longer aligned to 16 bytes
        {"residual": torch.zeros(64)},
        {"count": 8},
        {"count": 1},
    ],
    ids=["dtype", "alignment", "tensor", "number", "one"],
)
def test_what_triton_would_compile_for_is_looked_for(kernel: Kernel, change: dict[str, Any]) -> None:
    run(kernel, torch.zeros(64))
    run(kernel, **{"x": torch.zeros(64), **change})
    assert len(kernel.looks) == 2
    assert not kernel.launches


BOXES = {"x": Boxes.of((8, 8), (4, 8)), "residual": Boxes.of((8, 8), (4, 8))}


def described(tensor: Tensor) -> TensorDescriptor:
    return TensorDescriptor(tensor, [8, 8], [8, 1], [4, 8])


def test_boxes_are_given_as_descriptors_of_each_launchs_own_tensors(kernel: Kernel) -> None:
    first, second = torch.zeros(64), torch.ones(64)
    for x in (first, second):
        launch.run(kernel, (3, 2), x, None, 7, 0.5, boxes=BOXES, num_warps=4, FLAG=True, BLOCK=64)
    (look,) = kernel.looks
    assert look[1] == (described(first), None, 7, 0.5)
    assert look[1][0].base is first
    ((_, args),) = kernel.launches
    assert args == (described(second), None, 7, 0.5, 64, True)
    assert args[0].base is second


@pytest.mark.parametrize("boxes", [{"x": BOXES["x"]._replace(block=(2, 8))}, {"x": Boxes.of((4, 16), (4, 8))}, {}])
def test_other_boxes_are_looked_for(boxes: dict[str, Boxes], kernel: Kernel) -> None:
    x = torch.zeros(64)
    for of in (BOXES, boxes):
        launch.run(kernel, (3, 2), x, None, 7, 0.5, boxes=of, num_warps=4, FLAG=True, BLOCK=64)
    assert len(kernel.looks) == 2


def test_a_recorded_launch_makes_descriptors_of_the_tensors_it_is_bound_to(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = mock.MagicMock()
    monkeypatch.setattr(launch.replay, "recorder", lambda: recorder)
    monkeypatch.setattr(launch.launches.Kernel, "of", lambda *_: None)
    first, second = torch.zeros(64), torch.arange(80.0)
    launch.run(kernel, (3, 2), first, None, 7, 0.5, boxes=BOXES, num_warps=4, FLAG=True, BLOCK=64)
    ((recorded, tensors), _) = recorder.launch.call_args
    assert [i for i, _ in tensors] == [0]
    recorded.places.append(launch.launches.Place(0, 64, torch.float32, torch.Size([64]), (1,)))
    recorded.bound()(second)
    ((_, args),) = kernel.launches
    assert args == (args[0], None, 7, 0.5, 64, True)
    assert torch.equal(args[0].base, second[16:])
    assert args[0].base.data_ptr() == second.data_ptr() + 64


def test_what_is_kept_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_COMPILED", 4)
    for count in range(20):
        run(kernel, torch.zeros(64), count=count)
    assert len(launch._compiled) <= 4
