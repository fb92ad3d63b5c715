"""The native head: average pool and fully connected layer in one call, and when a network's own modules run instead."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from oracles import assert_as_exact_as_eager, batch, needs_native
from torch import Tensor, nn

import fusedres
from fusedres import dispatch
from fusedres.measure import count_launches

pytestmark = needs_native

HEAD = "fusedres_cpu::head_fprop"
SHAPES = [(1, 2048, 7, 7, 1000), (3, 37, 5, 2, 10), (9, 64, 1, 1, 1), (1, 1, 40, 33, 17), (0, 8, 3, 3, 5)]

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def operands(n: int, c: int, h: int, w: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = batch(n, c, h, w, dtype=dtype)
    return x + 1, torch.randn(features, c, dtype=dtype) / c**0.5, torch.randn(features, dtype=dtype)


def network(dtype: torch.dtype = torch.float32) -> fusedres.ResNet:
    torch.manual_seed(0)
    return fusedres.ResNet(fusedres.FusedBasicBlock, [1, 1, 1, 1], 10).to(dtype).eval()


def launches(net: fusedres.ResNet, x: Tensor) -> dict[str, int]:
    return dict(count_launches(lambda: net.forward_head(x)).forward_ops)


@dtypes
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_eager(shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
    x, w, bias = operands(*shape, dtype)
    bias = bias if has_bias else None
    y = torch.ops.fusedres_cpu.head_fprop(x, w, bias)
    theirs = nn.functional.linear(x.mean((2, 3)), w, bias)
    assert (y.shape, y.dtype) == (theirs.shape, dtype)
    assert y.is_contiguous()
    exact = nn.functional.linear(x.double().mean((2, 3)), w.double(), None if bias is None else bias.double())
    assert_as_exact_as_eager(y, theirs, exact)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, w, bias = operands(3, 200, 9, 9, 70, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.ops.fusedres_cpu.head_fprop(x, w, bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, results[0]) for y in results[1:])


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_nan_and_infinity_reach_the_logits_of_their_image_alone(special: float) -> None:
    x, w, bias = operands(3, 20, 4, 4, 6, torch.float32)
    expected = torch.ops.fusedres_cpu.head_fprop(x, w, bias)
    x[1, 7, 2, 3] = special
    y = torch.ops.fusedres_cpu.head_fprop(x, w, bias)
    assert torch.equal(y.isfinite(), torch.tensor([[True], [False], [True]]).expand(3, 6))
    assert torch.equal(y[::2], expected[::2])


BAD: dict[str, Any] = {
    "a map in NCHW": lambda x, w, bias: (x.contiguous(), w, bias),
    "weights of other channels": lambda x, w, bias: (x, w[:, :5].contiguous(), bias),
    "weights with gaps": lambda x, w, bias: (x, w.t().contiguous().t(), bias),
    "weights of a conv": lambda x, w, bias: (x, w[:, :, None, None], bias),
    "weights of another dtype": lambda x, w, bias: (x, w.double(), bias.double()),
    "a bias too short": lambda x, w, bias: (x, w, bias[1:].clone()),
    "a half dtype": lambda x, w, bias: (x.half(), w.half(), bias.half()),
}


@pytest.mark.parametrize("change", BAD)
def test_bad_arguments_are_refused(change: str) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.fusedres_cpu.head_fprop(*BAD[change](*operands(2, 6, 3, 3, 4, torch.float32)))


@dtypes
def test_a_network_calls_it_and_follows_its_parameters(dtype: torch.dtype) -> None:
    net, x = network(dtype), batch(2, 512, 3, 2, dtype=dtype)
    with torch.no_grad():
        for _ in range(2):
            assert launches(net, x) == {HEAD: 1}
            truth = copy.deepcopy(net.fc).double()(x.double().mean((2, 3)))
            assert torch.allclose(net.forward_head(x).double(), truth, rtol=1e-5, atol=1e-6)
            net.fc.weight.data *= -2
    assert torch.equal(net.forward_head(x), net.fc(net.avgpool(x).flatten(1))), "with gradients the modules run"


def test_the_same_call_again_asks_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(), batch(2, 512, 3, 2, dtype=torch.float32)
    asked: list[Tensor] = []
    choose = dispatch.choose_head
    monkeypatch.setattr(dispatch, "choose_head", lambda w: asked.append(w) or choose(w))
    with torch.no_grad():
        expected = net.forward_head(x)
        assert len(asked) == 1
        assert torch.equal(net.forward_head(x), expected)
        net.fc.weight.mul_(2)
        net.fc.bias.data = 2 * net.fc.bias.data
        assert torch.allclose(net.forward_head(x), 2 * expected)
        assert len(asked) == 1
        net.forward_head(x[:1])
        net.fc.bias = nn.Parameter(net.fc.bias + 1)
        assert torch.allclose(net.forward_head(x), 2 * expected + 1)
        assert len(asked) == 3
        with dispatch.engine("reference"):
            net.forward_head(x)
        assert len(asked) == 4
    net.forward_head(x)
    assert len(asked) == 4, "with gradients the modules run"


@pytest.mark.parametrize("change", ["hook", "training", "weights with gaps", ".data with gaps", "bfloat16"])
@pytest.mark.parametrize("is_recalled", [True, False], ids=["recalled", "new"])
def test_the_modules_run_where_they_are_more_or_other(change: str, is_recalled: bool) -> None:
    net, x = network(), batch(2, 512, 3, 2, dtype=torch.float32)
    if is_recalled:
        with torch.no_grad():
            assert launches(net, x) == launches(net, x) == {HEAD: 1}
    if change == "hook":
        net.fc.register_forward_hook(lambda module, args, y: 2 * y)
    elif change == "training":
        net.train()
    elif change == "bfloat16":
        net, x = net.bfloat16(), x.bfloat16()
    elif change == ".data with gaps":
        net.fc.weight.data = net.fc.weight.data.t().contiguous().t()
    else:
        net.fc.weight = nn.Parameter(net.fc.weight.detach().t().contiguous().t())
    with torch.no_grad():
        assert HEAD not in launches(net, x)
        assert torch.equal(net.forward_head(x), net.fc(net.avgpool(x).flatten(1)))
