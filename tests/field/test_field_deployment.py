"""Field cases of deployment: compilers, ONNX, TorchScript, streams and graphs, machines without GPU or compiler."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from field_nets import (
    assert_all_near,
    assert_near,
    eager_net,
    gradients,
    small_bottleneck_net,
    small_net,
)
from oracles import batch
from torch import nn

import fusedres

ROOT = Path(fusedres.__file__).parent.parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
nets = pytest.mark.parametrize("make", [small_net, small_bottleneck_net], ids=["basic", "bottleneck"])


def cuda_twins() -> tuple[nn.Module, nn.Module]:
    eager = eager_net(small_bottleneck_net).cuda()
    fused = fusedres.ResNet(fusedres.FusedBottleneck, [1, 1, 1, 1], 10).cuda()
    fused.load_state_dict(eager.state_dict())
    return fused, eager


@pytest.mark.case("F42")
@pytest.mark.slow
def test_step_compiles_into_one_graph_that_equals_the_uncompiled_step_and_counts_once(drop_in: Callable) -> None:
    fused = drop_in(small_net, eager_net(small_net)).train()
    plain = copy.deepcopy(fused)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = batch(2, 3, 64, 64)
    ours, theirs = compiled(x), plain(x)
    assert_near(ours, theirs, 1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_all_near(gradients(fused), gradients(plain), 1e-3)
    assert_all_near(fused.named_buffers(), plain.named_buffers(), 1e-5)
    assert fused.bn1.num_batches_tracked.item() == 1
    fused.eval()
    with torch.no_grad():
        assert_near(compiled(x), plain.eval()(x), 1e-4)


@pytest.mark.case("F43")
@pytest.mark.slow
@nets
def test_onnx_has_standard_nodes_alone_and_eagers_outputs(make: Callable, drop_in: Callable, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    eager = eager_net(make).eval()
    fused, x = drop_in(make, eager).eval(), batch(2, 3, 64, 64)
    with torch.no_grad():
        expected = eager(x)
        fused(x)  # what is folded now must not be what is exported
    path = tmp_path / "net.onnx"
    torch.onnx.export(fused, (x,), path, dynamo=True, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.contiguous().numpy()})
    assert_near(torch.from_numpy(found), expected, 1e-4)


@pytest.mark.case("F43")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_trace_holds_aten_ops_on_the_parameters_themselves(grad: bool, drop_in: Callable) -> None:
    fused = drop_in(small_net, eager_net(small_net)).eval()
    x = batch(2, 3, 64, 64)
    with torch.set_grad_enabled(grad):
        fused(x)
        traced = torch.jit.trace(fused, x)
        assert "fusedres::" not in str(traced.inlined_graph)
        assert "fusedres_cpu::" not in str(traced.inlined_graph)
        assert_near(traced(x), fused(x), 1e-5)
        fused.layer1[0].conv1.weight.data.mul_(2)
        assert_near(traced(x), fused(x), 1e-5)


BARE_MACHINE = """
import sys, warnings
sys.modules["triton"] = None
import torch, torchvision, fusedres
torch.manual_seed(0)
torch.set_num_threads(1)
eager = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 10).double()
fused = fusedres.ResNet(fusedres.FusedBasicBlock, [1, 1, 1, 1], 10).double()
fused.load_state_dict(eager.state_dict())
models = [fused] + ([fusedres.fuse(eager)] if hasattr(fusedres, "fuse") else [])
x = torch.randn(2, 3, 64, 64, dtype=torch.double)
results = []
for model in (eager, *models):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(x).square().sum().backward()
    optimizer.step()
    results.append(model.eval()(x))
for y in results[1:]:
    torch.testing.assert_close(y, results[0], rtol=1e-8, atol=1e-8)
print("equal")
"""


@pytest.mark.case("F44")
def test_machine_without_triton_compiler_or_gpu_trains_as_eager(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", BARE_MACHINE],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr
    assert done.stderr.count("Warning") <= 1


@pytest.mark.case("F44")
def test_cpu_tensors_stay_on_the_cpu_where_a_gpu_claims_to_be_there(
    drop_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, x = drop_in(small_net, eager_net(small_net)), batch(2, 3, 64, 64)
    expected = copy.deepcopy(fused)(x)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fusedres.dispatch._choose.cache_clear()
    y = fused(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert y.device.type == "cpu"


@pytest.mark.case("F44")
@needs_two_gpus
def test_second_gpu_computes_what_the_first_one_does() -> None:
    fused, _ = cuda_twins()
    x = batch(2, 3, 64, 64)
    expected = fused(x.cuda())
    other = copy.deepcopy(fused).to("cuda:1")
    assert_near(other(x.to("cuda:1")).to("cuda:0"), expected, 1e-5)


@pytest.mark.case("F40")
@needs_cuda
def test_side_stream_sees_what_was_queued_before_on_it() -> None:
    fused, eager = cuda_twins()
    fused.eval()
    x = torch.zeros(2, 3, 64, 64, device="cuda")
    source = batch(2, 3, 64, 64).cuda()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        x.copy_(source)
        y = fused(x)
    torch.cuda.synchronize()
    with torch.no_grad():
        assert_near(y, eager.eval()(source), 1e-3)


@pytest.mark.case("F40")
@needs_cuda
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_captured_graph_replays_on_new_data_and_moves_statistics_once(training: bool) -> None:
    fused, eager = cuda_twins()
    fused.train(training)
    eager.train(training)
    static = batch(2, 3, 64, 64).cuda()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    start = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(2):
                fused(static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = fused(static)
        for name, tensor in fused.state_dict().items():
            tensor.copy_(start[name])
        for seed in range(3):
            static.copy_(batch(2, 3, 64, 64, seed=seed))
            graph.replay()
            expected = eager(static)
    assert_near(y, expected, 1e-3)
    assert_all_near(fused.named_buffers(), eager.named_buffers(), 1e-3)
