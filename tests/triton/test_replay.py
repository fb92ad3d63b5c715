"""Recorded programs: they give what the calls they stand for give, bit for bit, and nothing where they could not."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launches import launched
from oracles import batch, block_twins, shake
from torch import Tensor, nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, launches, native, ops, replay
from fusedres.functional import stem
from fusedres.kernels import configs
from fusedres.launches import Kernel, Launch
from fusedres.recorder import Recorder

ENGINES = ("triton", "cudnn")
#: kind, inplanes, planes, stride, size of the map: both shortcuts, and maps large enough that units run closed.
BLOCKS = {
    "basic": (FusedBasicBlock, 8, 8, 1, 7),
    "bottleneck": (FusedBottleneck, 16, 4, 1, 6),
    "bottleneck-stride": (FusedBottleneck, 12, 4, 2, 8),
}
STEPS = 3


@pytest.fixture(autouse=True)
def _nothing_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_met", {})


def block(name: str, device: str, **options: Any) -> nn.Module:
    kind, inplanes, planes, stride, _ = BLOCKS[name]
    fused, _ = block_twins(kind, inplanes, planes, stride, **options)
    return fused.to(device).train()


def images(name: str, device: str, step: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    _, inplanes, _, _, side = BLOCKS[name]
    return batch(2, inplanes, side, side, dtype=dtype, seed=step).to(device)


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a step, and which buffers autograd knows to have changed."""
    versions = [b._version for b in module.buffers()]
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = module(x)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    gradients = [x.grad, *(p.grad for p in module.parameters())]
    buffers = [b.clone() for b in module.buffers()]
    moved = torch.tensor([b._version > before for b, before in zip(module.buffers(), versions, strict=True)])
    return [y.detach(), *gradients, *buffers, moved]


def programs() -> list[Callable[..., Any] | None]:
    return [met.program for met in replay._met.values()]


@pytest.mark.parametrize("memory", ["standard", "recompute"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("triton", torch.float32), ("triton", torch.float16), ("cudnn", torch.bfloat16), ("cudnn", torch.float16)],
    ids=str,
)
def test_replayed_steps_equal_called_ones(
    engine: str, name: str, memory: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = block(name, device, memory=memory).to(dtype)
    called = copy.deepcopy(replayed)
    with fusedres.engine(engine):
        got = [results(replayed, images(name, device, i, dtype)) for i in range(STEPS)]
        assert len(programs()) == 2
        assert all(programs())
        monkeypatch.setattr(replay, "_may_replay", lambda first: False)
        expected = [results(called, images(name, device, i, dtype)) for i in range(STEPS)]
    for step, right in zip(got, expected, strict=True):
        assert all(map(torch.equal, step, right))


@pytest.mark.parametrize("name", ["basic", "bottleneck-stride"])
def test_replayed_steps_under_autocast_equal_called_ones(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = block(name, device)
    called = copy.deepcopy(replayed)
    with fusedres.engine("cudnn"), torch.autocast(device, torch.bfloat16):
        got = [results(replayed, images(name, device, i, torch.float32)) for i in range(STEPS)]
        assert all(programs())
        monkeypatch.setattr(replay, "_may_replay", lambda first: False)
        expected = [results(called, images(name, device, i, torch.float32)) for i in range(STEPS)]
    for step, right in zip(got, expected, strict=True):
        assert all(map(torch.equal, step, right))


def test_replayed_launches_with_descriptors_equal_called_ones(device: str) -> None:
    tiles = configs.machine(torch.device(device)).descriptors
    if not tiles:
        pytest.skip("needs tensor descriptors: compute capability 9.0")
    w = batch(16, 16, 1, 1, dtype=torch.float16).to(device)

    def convolve(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return ops.conv_fprop(x, w, None, None, None, (1, 1), (0, 0), (1, 1), 1, False, True)

    with fusedres.engine("triton"), configs.trying(tiles[0]):
        for i in range(STEPS + 1):
            x, got = batch(2, 16, 5, 7, dtype=torch.float16, seed=i).to(device), []
            names = launched(lambda x=x, got=got: got.extend(replay.call(convolve, (), (x, w))))
            assert names["conv_descriptor_kernel"] == 1
            assert all(map(torch.equal, got, convolve(x, w)))
    (program,) = programs()
    assert program is not None


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return stem(x, self.conv, self.bn, self.relu, self.maxpool)


def test_replayed_stem_equals_the_called_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = shake(Stem()).to(device).half().train()
    called = copy.deepcopy(replayed)
    x = [batch(2, 3, 17, 14, dtype=torch.float16, seed=i).to(device) for i in range(STEPS)]
    with fusedres.engine("triton"):
        got = [results(replayed, images) for images in x]
        assert len(programs()) == 2
        assert all(programs())
        monkeypatch.setattr(replay, "_may_replay", lambda first: False)
        expected = [results(called, images) for images in x]
    for step, right in zip(got, expected, strict=True):
        assert all(map(torch.equal, step, right))


def test_another_problem_gets_its_own_program(device: str) -> None:
    module = block("bottleneck", device).half()
    x = images("bottleneck", device)
    with fusedres.engine("triton"):
        for y in (x, x, x, x[:1], x[:1], x[:1]):
            results(module, y)
        assert len(programs()) == 4
        module.bn1.momentum = 0.5  # a setting that is no tensor's
        for _ in range(3):
            before = module.bn1.running_mean.clone()
            results(module, x)
        moved = module.bn1.running_mean - before
    assert len(programs()) == 6
    reference = module.conv1(x).float().mean((0, 2, 3)) - before
    torch.testing.assert_close(moved.float(), 0.5 * reference, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("other", ["negative view", "subclass", "shared"])
def test_what_no_program_stands_for_is_called(other: str, device: str) -> None:
    class Subclass(Tensor):
        pass

    module = block("bottleneck", device).half()
    x = images("bottleneck", device)
    if other == "negative view":
        x = torch._neg_view(x)
    elif other == "subclass":
        x = x.as_subclass(Subclass)
    else:
        module.bn2.weight = module.bn1.weight
    with fusedres.engine("triton"), torch.no_grad():
        outputs = [module(x) for _ in range(4)]
    assert not any(programs())
    assert all(torch.equal(outputs[0], y) for y in outputs)


def test_a_function_that_looks_at_values_is_called(device: str) -> None:
    def sign(x: Tensor) -> tuple[Tensor]:
        return (x if x.sum() > 0 else -x,)

    x = torch.ones(4, 4, device=device, dtype=torch.float16)
    with fusedres.engine("triton"):
        for value in (x, x, x, -x, -x):
            assert torch.equal(replay.call(sign, (), (value,))[0], x)
    assert programs() == [None]


def test_a_tensor_from_elsewhere_is_not_recorded(device: str) -> None:
    x = torch.ones(4, 4, device=device, dtype=torch.float16)
    elsewhere = iter([torch.full_like(x, i) for i in range(4)])

    def add_next(x: Tensor) -> tuple[Tensor]:
        return (x + next(elsewhere),)

    with fusedres.engine("triton"):
        for i in range(4):
            assert torch.equal(replay.call(add_next, (), (x,))[0], x + i)
    assert programs() == [None]


def test_what_is_kept_is_bounded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 3)
    with fusedres.engine("triton"):
        for n in range(1, 9):
            replay.call(lambda x: (x + 1,), (), (torch.ones(n, 2, device=device, dtype=torch.float16),))
    assert len(replay._met) <= 3


class Driver:
    """``cuLaunchKernel`` for kernels that Triton's interpreter runs, on the memory that the library points to."""

    def __init__(self) -> None:
        unsigned, pointer = [ctypes.c_uint] * 7, ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(ctypes.c_int, pointer, *unsigned, pointer, ctypes.POINTER(pointer), pointer)
        self.launches: list[Launch] = []
        self.error = 0
        self.calls = 0
        self._callback = kind(self._launch)
        self.address = ctypes.cast(self._callback, pointer).value

    def describe(self, launch: Launch, tensors: list[tuple[int, Tensor]]) -> None:
        """Let ``launch`` be one of a compiled kernel, of which this driver knows what it does."""
        self.launches.append(launch)
        kinds = {i: "*fp16" for i, _ in tensors} | {
            i: {int: "i64", float: "fp64"}[type(arg)] for i, arg in enumerate(launch.others) if arg is not None
        }
        number = len(self.launches)
        launch.kernel = Kernel(number, (number, 2, 3), 128, 1 << 15, tuple(sorted(kinds.items())))

    def _launch(self, function: int, *settings: Any) -> int:
        *numbers, stream, params, extra = settings
        assert numbers == [function, 2, 3, 128, 1, 1, 1 << 15]
        assert (stream, extra) == (STREAM, None)
        self.calls += 1
        launch = self.launches[function - 1]
        assert launch.kernel is not None
        args, places = launch.others.copy(), {place.argument: place for place in launch.places}
        for j, (i, kind) in enumerate(launch.kernel.params):
            value = {"fp64": ctypes.c_double}.get(kind, ctypes.c_int64).from_address(params[j]).value
            if i in places:
                args[i] = self._tensor(value, places[i])
            else:
                assert args[i] == value
        assert ctypes.c_int64.from_address(params[len(launch.kernel.params) + 1]).value == 0  # a scratch memory
        launch.function(*args)
        return self.error

    @staticmethod
    def _tensor(address: int, place: launches.Place) -> Tensor:
        if 0 in place.size:
            return torch.empty(place.size, dtype=place.dtype)
        elements = 1 + sum((size - 1) * stride for size, stride in zip(place.size, place.stride, strict=True))
        memory = (ctypes.c_char * (elements * place.dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=place.dtype).as_strided(place.size, place.stride)


STREAM = 77


@pytest.fixture
def driver(device: str, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Whatever is recorded within the test is launched by the native library, with this driver."""
    if device != "cpu" or launches.native_launch() is None:
        pytest.skip(f"needs the interpreter and the native library: {native.missing}")
    driver, note = Driver(), Recorder.launch

    def launch(self: Recorder, launch: Launch, tensors: list[tuple[int, Tensor]]) -> None:
        driver.describe(launch, tensors)
        note(self, launch, tensors)

    monkeypatch.setattr(Recorder, "launch", launch)
    monkeypatch.setattr(launches, "driver_launch", lambda: driver.address)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM)
    return driver


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_native_launches_are_those_of_the_kernels(
    engine: str, name: str, device: str, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = block(name, device).half()
    called = copy.deepcopy(replayed)
    with fusedres.engine(engine):
        got = [results(replayed, images(name, device, i)) for i in range(STEPS)]
        assert driver.calls == (STEPS - 2) * len(driver.launches)
        text = "".join(program.__self__.code for program in programs())  # type: ignore[union-attr]
        assert 0 < text.count(" = fusedres_launches_launch") < len(driver.launches)
        monkeypatch.setattr(replay, "_may_replay", lambda first: False)
        expected = [results(called, images(name, device, i)) for i in range(STEPS)]
    for step, right in zip(got, expected, strict=True):
        assert all(map(torch.equal, step, right))


def test_an_error_of_the_driver_is_raised(device: str, driver: Driver) -> None:
    module, x = block("basic", device).half(), images("basic", device)
    with fusedres.engine("triton"):
        results(module, x)
        results(module, x)
        driver.error = 719
        with pytest.raises(RuntimeError, match="error 719"):
            results(module, x)


def test_small_tensors_of_launches_share_an_allocation(device: str) -> None:
    module, x = block("bottleneck", device).half(), images("bottleneck", device)
    with fusedres.engine("triton"):
        for _ in range(3):
            results(module, x)
    forward, _ = programs()
    assert forward is not None
    kept = 7  # the output, and of each unit z and its BN's vectors
    assert forward.__self__.code.count("torch.empty_strided(") == kept + 1  # type: ignore[attr-defined]
