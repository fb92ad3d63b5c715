"""torch.compile and torch.export of fused modules: one graph, the same numbers, statistics moved once."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from oracles import assert_steps_equal, batch, block_twins, shake, step
from torch import Tensor, nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU
from fusedres.functional import stem

pytestmark = pytest.mark.usefixtures("one_thread")

double = torch.float64
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return stem(x, self.conv, self.bn, self.relu, self.maxpool)


#: name -> (module, input channels)
MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "basic": (lambda: block_twins(FusedBasicBlock, 8, 8)[0], 8),
    "bottleneck-projection": (lambda: block_twins(FusedBottleneck, 8, 4, 2)[0], 8),
    "bottleneck-recompute": (lambda: block_twins(FusedBottleneck, 8, 2, memory="recompute")[0], 8),
    "layer": (lambda: shake(FusedConvBNReLU(8, 6, bias=True)), 8),
    "stem": (lambda: shake(Stem()), 3),
    "hooked": (lambda: hooked(block_twins(FusedBasicBlock, 8, 8)[0]), 8),
}


def hooked(block: nn.Module) -> nn.Module:
    block.bn1.register_forward_hook(double_output)
    return block


def double_output(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return 2 * y


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled(nn.Module):
    """Compiles anew in every copy, so that ``step`` may copy it; names are those of the module itself."""

    def __init__(self, module: nn.Module, **options: object) -> None:
        super().__init__()
        self.options = {"backend": "aot_eager", "fullgraph": True, **options}
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.compile(self.module, **self.options)(x)


def assert_compiled_step_equals(module: nn.Module, x: Tensor, **options: object) -> None:
    compiled = step(Compiled(module, **options), x)
    plain = step(module, x)
    assert_steps_equal({name.replace("module.", "", 1): value for name, value in compiled.items()}, plain)


@modes
@pytest.mark.parametrize("name", MODULES)
def test_compiled_step_equals_the_uncompiled_one_in_one_graph(name: str, training: bool) -> None:
    build, channels = MODULES[name]
    assert_compiled_step_equals(build().double().train(training), batch(2, channels, 10, 9, dtype=double))


@modes
@pytest.mark.parametrize("name", MODULES)
def test_compiled_forward_without_gradients_equals_the_uncompiled_one(name: str, training: bool) -> None:
    build, channels = MODULES[name]
    module = build().double().train(training)
    twin, x = copy.deepcopy(module), batch(2, channels, 10, 9, dtype=double)
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-10, atol=1e-10)
    assert_steps_equal(dict(module.named_buffers()), dict(twin.named_buffers()))


def test_statistics_and_counter_move_once_a_step() -> None:
    module = FusedBottleneck(8, 2).train()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for count in (1, 2, 3):
        compiled(batch(2, 8, 5, 4).requires_grad_()).sum().backward()
        assert {int(bn.num_batches_tracked) for bn in (module.bn1, module.bn2, module.bn3)} == {count}


@pytest.mark.parametrize("momentum", [None, 0.0])
def test_any_momentum_compiles(momentum: float | None) -> None:
    module = block_twins(FusedBasicBlock, 8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=momentum))[0].double()
    assert_compiled_step_equals(module, batch(2, 8, 6, 5, dtype=double))


def test_dynamic_shapes_compile_once() -> None:
    module, graphs = block_twins(FusedBottleneck, 8, 4, 2)[0].double().eval(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for size in ((2, 8, 6, 5), (3, 8, 6, 5), (4, 8, 9, 11)):
        x = batch(*size, dtype=double).requires_grad_()
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-10, atol=1e-10)
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_training_step_of_any_batch_and_size_is_one_graph(backend: str) -> None:
    module = block_twins(FusedBottleneck, 8, 4, 2)[0].double()
    twin = copy.deepcopy(module)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for size in ((2, 8, 10, 9), (3, 8, 10, 9), (4, 8, 12, 11)):
        gradients = []
        for call in (compiled, twin):
            x = batch(*size, dtype=double).requires_grad_()
            call(x).square().sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_steps_equal(dict(module.named_buffers()), dict(twin.named_buffers()))


def test_compiled_model_follows_its_modes() -> None:
    module = shake(FusedBasicBlock(8, 8)).double()
    twin, x = copy.deepcopy(module), batch(2, 8, 6, 5, dtype=double)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for training in (True, False, True):
        module.train(training), twin.train(training)
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        for m in (module.eval(), twin.eval()):
            m.bn1.weight.mul_(2)
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-10, atol=1e-10)
    assert_steps_equal(dict(module.named_buffers()), dict(twin.named_buffers()))


@modes
def test_autocast_compiles(training: bool) -> None:
    module = block_twins(FusedBottleneck, 8, 4, 2)[0].train(training)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = step(Compiled(module), batch(2, 8, 6, 5)), step(module, batch(2, 8, 6, 5))
    assert ours["y"].dtype == torch.bfloat16
    for name, value in plain.items():
        torch.testing.assert_close(ours[name if name in ours else f"module.{name}"], value, msg=name)


@modes
def test_forced_engine_compiles(training: bool) -> None:
    module = block_twins(FusedBottleneck, 8, 4, 2)[0].double().train(training)
    for name in ("reference", "cpu"):
        torch._dynamo.reset()
        with fusedres.engine(name):
            assert_compiled_step_equals(module, batch(2, 8, 6, 5, dtype=double))


@modes
def test_exported_program_computes_the_same(training: bool) -> None:
    module = block_twins(FusedBottleneck, 8, 4, 2)[0].double().train(training)
    x = batch(2, 8, 6, 5, dtype=double)
    program = torch.export.export(copy.deepcopy(module), (x,), strict=False)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-10, atol=1e-10)
    assert any("fusedres" in str(node.target) for node in program.graph.nodes)


@needs_compiler
@pytest.mark.slow
def test_inductor_equals_the_uncompiled_step() -> None:
    module = block_twins(FusedBottleneck, 8, 4, 2)[0].double()
    assert_compiled_step_equals(module, batch(2, 8, 10, 9, dtype=double), backend="inductor")
