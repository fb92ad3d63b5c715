"""When a network's head is one launch of the ``cuda`` engine, and all that its modules run for instead."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated_engine import EmulatedCUDA, emulated_engine
from oracles import batch
from torch import Tensor, nn

import fusedres
from fusedres.measure import count_launches

HEAD = "fusedres_cuda::head_fprop"


@pytest.fixture(autouse=True)
def engine() -> Iterator[EmulatedCUDA]:
    with emulated_engine() as engine, fusedres.engine("cuda"):
        yield engine


def network(dtype: torch.dtype = torch.float16) -> fusedres.ResNet:
    torch.manual_seed(0)
    return fusedres.ResNet(fusedres.FusedBasicBlock, [1, 1, 1, 1], 10).to(dtype).eval()


def features(dtype: torch.dtype = torch.float16) -> Tensor:
    return batch(2, 512, 3, 2, dtype=dtype)


def launches(net: fusedres.ResNet, x: Tensor, **options: Any) -> dict[str, int]:
    return dict(count_launches(lambda: net.forward_head(x, **options)).forward_ops)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_is_one_launch_and_follows_its_parameters(dtype: torch.dtype, bias: bool) -> None:
    net, x = network(dtype), features(dtype)
    net.fc = nn.Linear(512, 10, bias=bias, dtype=dtype).eval()
    with torch.no_grad():
        for _ in range(2):
            assert launches(net, x) == {HEAD: 1}
            truth = copy.deepcopy(net.fc).double()(x.double().mean((2, 3)))
            theirs = net.fc(net.avgpool(x).flatten(1))
            limit = 2 * (theirs - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
            assert (net.forward_head(x) - truth).abs().max() <= limit
            net.fc.weight.data *= -2


def test_a_contiguous_map_and_one_that_begins_in_the_middle_of_16_bytes_are_served() -> None:
    net, x = network(), features()
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    view = memory.view(2, 3, 2, 512).permute(0, 3, 1, 2).copy_(x)
    assert view.data_ptr() % 16 == 2
    with torch.no_grad():
        expected = net.forward_head(x)
        for other in (x.contiguous(), view):
            assert launches(net, other)[HEAD] == 1
            assert torch.equal(net.forward_head(other), expected)


def doubled(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return 2 * y


class TwiceLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def subclassed(net: fusedres.ResNet) -> None:
    net.fc.__class__ = TwiceLinear


def sized(net: fusedres.ResNet) -> None:
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d((2, 1)), nn.Linear(1024, 10).half()


CHANGES: dict[str, Callable[[fusedres.ResNet], Any]] = {
    "hook on the pool": lambda net: net.avgpool.register_forward_hook(doubled),
    "hook on the layer": lambda net: net.fc.register_forward_hook(doubled),
    "hook before the layer": lambda net: net.fc.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
    "replaced forward": lambda net: setattr(net.fc, "forward", lambda x: x + 1),
    "subclass": subclassed,
    "another pool": lambda net: net.reset_classifier(10, "max"),
    "a pool that is not global": sized,
    "no layer": lambda net: net.reset_classifier(0),
    "a layer of channels that are no multiple of 8": lambda net: setattr(net, "fc", nn.Linear(500, 10).half()),
    "training": lambda net: net.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_are_more_than_pool_and_layer_run(change: str) -> None:
    net, x = network(), features()
    CHANGES[change](net)
    x = x[:, :500].contiguous(memory_format=torch.channels_last) if "multiple" in change else x
    with torch.no_grad():
        assert HEAD not in launches(net, x)
        assert torch.equal(net.forward_head(x), net.fc(net.avgpool(x).flatten(1)))


def test_a_hook_on_all_modules_is_called() -> None:
    net, seen = network(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        with torch.no_grad():
            assert HEAD not in launches(net, features())
    finally:
        handle.remove()
    assert seen == [net.avgpool, net.fc]


def test_dropout_while_training_runs_and_in_eval_does_nothing() -> None:
    net, x = network(), features()
    net.drop_rate = 0.5
    with torch.no_grad():
        assert launches(net, x) == {HEAD: 1}
        assert HEAD not in launches(net.train(), x)


def test_pre_logits_are_the_means() -> None:
    net, x = network(), features()
    with torch.no_grad():
        assert HEAD not in launches(net, x, pre_logits=True)


def test_gradients_go_through_the_modules() -> None:
    net, x = network(), features()
    assert HEAD not in launches(net, x)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    assert launches(net, x) == {HEAD: 1}
    assert HEAD not in launches(net, x.requires_grad_())


def test_autocast_decides_the_dtype_as_in_eager() -> None:
    x = features(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert HEAD not in launches(network(torch.float32), x)
        assert HEAD not in launches(network(), features())
        assert launches(network(torch.bfloat16), x) == {HEAD: 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_run_the_modules(dtype: torch.dtype) -> None:
    with torch.no_grad():
        assert HEAD not in launches(network(dtype), features(dtype))


def test_an_empty_batch_and_bad_input_are_the_modules_affair() -> None:
    net = network()
    with torch.no_grad():
        assert net.forward_head(features()[:0]).shape == (0, 10)
        with pytest.raises(RuntimeError):
            net.forward_head(features(torch.bfloat16))
        with pytest.raises(RuntimeError):
            net.forward_head(features()[:, :8])


def test_what_is_traced_compiled_or_transformed_sees_the_modules() -> None:
    net, x = network().requires_grad_(False), features()
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda x: net.forward_head(x), x)
        assert "head_fprop" not in str(traced.graph)
        graphs = []
        torch._dynamo.reset()
        torch.compile(net.forward_head, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(x)
        assert "head_fprop" not in graphs[0].code
        assert "linear" in graphs[0].code
        mapped = torch.func.vmap(lambda image: net.forward_head(image[None]))(x)
        assert torch.equal(mapped, torch.func.vmap(lambda image: net.fc(net.avgpool(image[None]).flatten(1)))(x))


def test_it_is_served_by_name_alone() -> None:
    net, x = network(), features()
    with torch.no_grad(), fusedres.engine(None):
        assert HEAD not in launches(net, x)
        (row,) = [row for row in fusedres.explain(net) if row.name == "fc"]
    assert row.folded == "eager"
    assert "cuda: nobody has measured it on a GPU" in row.reason
