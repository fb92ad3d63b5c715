"""Launches, saved bytes and interleaved samples, on cases small enough to count by hand."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

import fusedres
from fusedres import measure


def test_views_and_allocations_are_no_launches() -> None:
    x = torch.randn(2, 3, 4)
    launches = measure.count_launches(lambda: x.view(6, 4).t().transpose(0, 1).detach().unsqueeze(0))
    assert launches.forward == 0
    assert measure.count_launches(lambda: torch.empty(3)).forward == 0


def test_each_computing_op_is_one_launch_forward_and_backward() -> None:
    x = torch.randn(4, requires_grad=True)
    launches = measure.count_launches(lambda: (x * 2).relu())
    assert launches.forward_ops == {"aten::mul": 1, "aten::relu": 1}
    assert launches.backward_ops == {"aten::threshold_backward": 1, "aten::mul": 1}
    assert (launches.forward, launches.backward) == (2, 2)


def test_convolution_backward_is_one_launch_for_each_gradient() -> None:
    conv = nn.Conv2d(2, 2, 3, bias=False)
    x = torch.randn(1, 2, 5, 5)
    assert measure.count_launches(lambda: conv(x)).backward_ops["aten::convolution_backward"] == 1  # wgrad
    conv.zero_grad()
    x.requires_grad_()
    assert measure.count_launches(lambda: conv(x)).backward_ops["aten::convolution_backward"] == 2  # and dgrad


def test_an_op_of_fusedres_is_one_launch_whatever_its_engine_does() -> None:
    z, bn = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last), torch.ones(4, 4)
    with fusedres.engine("reference"):
        launches = measure.count_launches(lambda: torch.ops.fusedres.scale_shift_add_relu(z, bn, None, None, True))
    assert launches.forward_ops == {"fusedres::scale_shift_add_relu": 1}


def test_without_grad_there_is_no_backward() -> None:
    with torch.inference_mode():
        assert measure.count_launches(lambda: torch.ones(3) * 2).backward == 0


def test_saved_bytes_leave_out_the_input_and_the_parameters() -> None:
    assert measure.saved_bytes(nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)) == 0


def test_a_storage_saved_twice_counts_once() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2))
    # ReLU's output is saved by ReLU and by the second Linear; the third saves the second's output.
    assert measure.saved_bytes(model, torch.randn(4, 8)) == 2 * (4 * 16) * 4


def test_a_view_counts_with_its_whole_storage() -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2)[:4].square()

    assert measure.saved_bytes(Half(), torch.randn(8, requires_grad=True)) == 8 * 4


def test_what_was_measured_is_freed() -> None:
    held = []

    class Noting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (2 * x).exp()  # exp keeps its output
            held.append(weakref.ref(y.untyped_storage()))
            return y.sum()

    gc.disable()
    try:
        measure.saved_bytes(Noting(), torch.randn(8, requires_grad=True))
        assert held[0]() is None
    finally:
        gc.enable()


def test_contestants_take_turns_and_warm_up_is_not_recorded() -> None:
    calls: list[str] = []
    done: list[int] = []
    fns = {name: lambda name=name: calls.append(name) for name in "ABC"}
    samples = measure.interleaved(fns, rounds=2, warmup=1, on_round=done.append)
    assert "".join(calls) == "ABC" * 3
    assert done == [1, 2]
    assert {name: len(times) for name, times in samples.items()} == {"A": 2, "B": 2, "C": 2}
    assert all(seconds > 0 for times in samples.values() for seconds in times)


def test_medians() -> None:
    assert measure.medians({"A": [3.0, 1.0, 2.0]}) == {"A": 2.0}


def test_a_fused_block_makes_fewer_launches_and_keeps_less_than_its_parts() -> None:
    from fusedres.cli.networks import EagerBlock

    block = fusedres.FusedBottleneck(64, 16).to(memory_format=torch.channels_last)
    eager = EagerBlock(block)
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    fused_launches, eager_launches = (measure.count_launches(lambda m=m: m(x)) for m in (block, eager))
    assert fused_launches.forward < eager_launches.forward
    assert fused_launches.backward < eager_launches.backward
    assert measure.saved_bytes(block, x) < measure.saved_bytes(eager, x)
