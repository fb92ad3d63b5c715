"""The native programs of whole networks: chains one behind another in one call, bit for bit what each gives alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import images
from oracles import needs_native, ops_called, shake
from torch import Tensor
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from fusedres import FusedBasicBlock, FusedBottleneck, ResNet, folding

pytestmark = needs_native
kernels = torch.ops.fusedres_cpu
CL = torch.channels_last
GEOMETRY = [1, 1, 1, 1, 1, 1]


class Net:
    """A conv with BN and a pool, then two convs around which the input is added: the arguments of both ops."""

    def __init__(self, dtype: torch.dtype = torch.float32, is_packed: bool = True, size: tuple[int, int] = (26, 25)):
        torch.manual_seed(0)
        self.size = size
        pooled = [(side - 1) // 2 + 1 for side in size]
        self.weights = [torch.randn(16, c, 3, 3, dtype=dtype) / 12 for c in (4, 16, 16)]
        self.vectors = [torch.rand(16, dtype=dtype) for _ in range(15)]
        self.eps = torch.full((3,), 1e-5, dtype=torch.float64)
        sizes = [size, pooled, pooled]
        packed = [kernels.conv_pack(w, at, *[[1, 1]] * 3) for w, at in zip(self.weights, sizes, strict=True)]
        self.packed = packed if is_packed else []
        self.forms = [1, 0, 0, 1, 3, 2, 1, 2, 1, 0, 1, 0, 0, 0]

    def arguments(self, n: int) -> list[Any]:
        tensors = [self.weights, self.packed, self.vectors, self.eps]
        return [*tensors, 3 * GEOMETRY, self.forms, [n, 4, *self.size]]

    def program(self, n: int) -> Tensor:
        return kernels.eval_program(*self.arguments(n))

    def x(self, n: int) -> Tensor:
        x = torch.randn(n, 4, *self.size, dtype=self.weights[0].dtype)
        return x.contiguous(memory_format=CL)

    def chain_by_chain(self, x: Tensor) -> Tensor:
        def chain(x: Tensor, convs: slice, *form: Any) -> Tensor:
            weights, count = self.weights[convs], len(self.weights[convs])
            vectors = self.vectors[5 * convs.start : 5 * convs.stop]
            tensors = weights, self.packed[convs], vectors, self.eps[convs].clone()
            return kernels.eval_chain(x, None, *tensors, count * GEOMETRY, *form)

        y = chain(x, slice(0, 1), False, False, True, [3, 2, 1])
        return chain(y, slice(1, 3), True, False, True, [])


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "loose"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 9])
@pytest.mark.parametrize("size", [(26, 25), (70, 51)], ids=str)  # the second pools to a map that goes image by image
def test_a_network_is_its_chains(n: int, size: tuple[int, int], dtype: torch.dtype, is_packed: bool) -> None:
    net = Net(dtype, is_packed, size)
    x, program = net.x(n), net.program(n)
    for _ in range(2):
        assert torch.equal(kernels.eval_network(x, program), net.chain_by_chain(x))


def test_a_program_serves_any_number_of_threads() -> None:
    net = Net(size=(70, 51))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        x, program = net.x(2), net.program(2)
        expected = kernels.eval_network(x, program)
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            assert torch.equal(kernels.eval_network(x, program), expected)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_packed_is_read_at_every_call() -> None:
    net = Net(is_packed=False)
    x, program = net.x(2), net.program(2)
    before = kernels.eval_network(x, program)
    net.weights[1].mul_(2)
    net.vectors[3].add_(1)
    net.vectors[-1].data = net.vectors[-1].data + 1
    after = kernels.eval_network(x, program)
    assert not torch.equal(after, before)
    assert torch.equal(after, net.chain_by_chain(x))


def test_a_weight_that_lies_otherwise_is_planned_anew() -> None:
    net = Net(is_packed=False)
    x, program = net.x(2), net.program(2)
    expected = kernels.eval_network(x, program)
    net.weights[1].data = net.weights[1].data.contiguous(memory_format=CL)
    net.weights[2].data = net.weights[2].data.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(kernels.eval_network(x, program), expected)
    net.weights[2].data = torch.ones(1, 1, 1, 1).expand(16, 16, 3, 3)
    assert torch.equal(kernels.eval_network(x, program), net.chain_by_chain(x))
    net.weights[2].data = torch.ones(16, 8, 3, 3)
    with pytest.raises(RuntimeError, match="number of channels"):
        kernels.eval_network(x, program)


def test_a_program_keeps_its_tensors() -> None:
    net = Net()
    x, program = net.x(2), net.program(2)
    expected = kernels.eval_network(x, program)
    del net
    gc.collect()
    _ = [torch.randn(16, 16, 3, 3) for _ in range(50)]  # over what is free
    assert torch.equal(kernels.eval_network(x, program), expected)


BAD_INPUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "another batch": lambda x, program: (x[:1], program),
    "another size": lambda x, program: (x[:, :, 1:].contiguous(memory_format=CL), program),
    "another dtype": lambda x, program: (x.double(), program),
    "a map in NCHW": lambda x, program: (x.contiguous(), program),
    "a copy of the program": lambda x, program: (x, program.clone()),
    "zeros": lambda x, program: (x, torch.zeros_like(program)),
    "bytes off their place": lambda x, program: (x, torch.cat([program, program])[1 : 1 + len(program)]),
    "no bytes": lambda x, program: (x, program[:0]),
    "a program of floats": lambda x, program: (x, program.float()),
}


@pytest.mark.parametrize("change", BAD_INPUTS)
def test_bad_inputs_are_refused(change: str) -> None:
    net = Net()
    x, program = BAD_INPUTS[change](net.x(2), net.program(2))
    with pytest.raises(RuntimeError, match=r"x is|program is"):
        kernels.eval_network(x, program)


BAD_ARGUMENTS: dict[str, tuple[int, Any, str]] = {
    "no chain": (5, [], "forms"),
    "half a chain": (5, [1, 0, 0, 1], "forms"),
    "a chain of more convs than there are": (5, [4, 0, 0, 1, 0, 0, 0], "a chain of 4"),
    "a chain of a projection alone": (5, [1, 0, 1, 1, 0, 0, 0], "a chain of 1"),
    "a chain of countless convs": (5, [1, 0, 0, 1, 0, 0, 0, 2**63 - 1, 0, 0, 1, 0, 0, 0], "a chain of"),
    "an input that cannot be added": (5, [1, 1, 0, 1, 0, 0, 0], "no shortcut"),
    "a pool larger than 16": (5, [1, 0, 0, 1, 17, 1, 0], "kernel_size 17"),
    "three sizes": (6, [4, 26, 25], "input_size"),
    "a negative batch": (6, [-1, 4, 26, 25], "input_size"),
    "more pixels than memory has bytes": (6, [2**62, 4, 26, 25], "no memory"),
    "other channels": (6, [2, 5, 26, 25], "channels"),
    "a geometry too short": (4, GEOMETRY, "do not go together"),
    "half dtypes": (0, [torch.zeros(16, 4, 3, 3, dtype=torch.half)] * 3, "float32 or float64"),
}


@pytest.mark.parametrize("change", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(change: str) -> None:
    at, value, message = BAD_ARGUMENTS[change]
    arguments = Net().arguments(2)
    arguments[at] = value
    with pytest.raises(RuntimeError, match=message):
        kernels.eval_program(*arguments)


@torch.no_grad()
@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "live"])
@pytest.mark.parametrize("block", [FusedBasicBlock, FusedBottleneck])
def test_a_recalled_network_is_one_call_unless_somebody_counts(block: Any, is_frozen: bool) -> None:
    torch.manual_seed(0)
    net = shake(ResNet(block, [1, 2, 1, 1], num_classes=5, width_per_group=64)).eval()
    if is_frozen:
        folding.freeze(net)
    x = images(2, 32, torch.float32)
    with FlopCounterMode(display=False) as first:
        net(x)
    for _ in range(3):
        expected = net(x)
    with profile() as profiled:
        assert torch.equal(net(x), expected)
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls["fusedres_cpu::eval_network"] == 1
    assert "fusedres_cpu::eval_chain" not in calls
    with FlopCounterMode(display=False) as again:
        net(x)
    assert again.get_total_flops() == first.get_total_flops() > 0
    assert ops_called(lambda: net(x))["fusedres_cpu::eval_chain"] == 6
