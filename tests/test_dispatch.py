"""Which engine computes an op, how one is preferred, and what still works where an engine is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracles import batch, needs_native

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, dispatch, native
from fusedres.engines import Engine, nvidia
from fusedres.engines.cpu import CPU
from fusedres.engines.reference import REFERENCE
from fusedres.engines.triton import TRITON

#: Why the preferred engine does not serve CPU tensors.
NOT_ON_CUDA = "it computes on CUDA devices, the tensors are on cpu"

pytestmark = pytest.mark.usefixtures("one_thread")

PACKAGE = Path(fusedres.__file__).parent

#: Trains and evaluates a block of each kind; prints the engines and the names of libraries that were loaded.
TRAIN_AND_EVALUATE = """
import torch, torchvision, fusedres
torch.set_num_threads(1)
x = torch.randn(2, 8, 6, 5)
for kind, eager_kind in ((fusedres.FusedBasicBlock, torchvision.models.resnet.BasicBlock),
                         (fusedres.FusedBottleneck, torchvision.models.resnet.Bottleneck)):
    block, eager = (k(8, 8 // k.expansion).double() for k in (kind, eager_kind))
    eager.load_state_dict(block.state_dict())
    outputs = []
    for module in (block, eager):
        y = module(x.double())
        y.square().sum().backward()
        with torch.no_grad():
            outputs.append([y.detach(), module.eval()(x.double()), module.conv1.weight.grad])
    for ours, theirs in zip(*outputs):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    block.float()(x)
print(fusedres.dispatch.choose("dbn", "cpu", torch.float32).engine.name)
"""


class Recorder(Engine):
    """An engine that computes as ``reference`` and keeps a list of what it was asked for."""

    name = "recorder"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def rejects(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        return "it dislikes half" if dtype == torch.float16 else None

    def __getattr__(self, op: str) -> object:
        self.asked.append(op)
        return getattr(REFERENCE, op)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(dispatch, "ENGINES", {**dispatch.ENGINES, "recorder": recorder})
    dispatch._choose.cache_clear()
    yield recorder
    dispatch._choose.cache_clear()


def run_python(code: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own that finds fusedres under ``path``."""
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=path, capture_output=True, text=True, check=False)


@pytest.fixture
def without_native(tmp_path: Path) -> Path:
    """Where a copy of the package lies that has no native library."""
    shutil.copytree(PACKAGE, tmp_path / "fusedres", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_unknown_engine_is_refused_by_name() -> None:
    with (
        pytest.raises(ValueError, match="no engine is named 'gpu'; there are cuda, cudnn, triton, cpu, reference"),
        fusedres.engine("gpu"),
    ):
        pass
    assert dispatch.forced() is None


def test_engine_is_preferred_inside_its_context() -> None:
    with fusedres.engine("reference"):
        assert dispatch.choose("dbn", "cpu", torch.float32).engine is REFERENCE
        with fusedres.engine("cpu"):
            assert dispatch.forced() == "cpu"
            with fusedres.engine(None):
                assert dispatch.forced() is None
        assert dispatch.forced() == "reference"
    assert dispatch.forced() is None


def test_preference_ends_with_its_context_even_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), fusedres.engine("reference"):
        raise ZeroDivisionError
    assert dispatch.forced() is None


def test_engine_holds_for_its_thread_alone() -> None:
    seen = []
    with fusedres.engine("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_engine_may_decorate_a_function() -> None:
    @fusedres.engine("reference")
    def forced() -> str | None:
        return dispatch.forced()

    assert forced() == forced() == "reference"
    assert dispatch.forced() is None


def test_environment_prefers_an_engine() -> None:
    code = "import torch, fusedres; print(fusedres.dispatch.choose('conv_fprop', 'cpu', torch.float32).engine.name)"
    assert run_python(code, FUSEDRES_ENGINE="reference").stdout.strip() == "reference"


def test_unknown_engine_in_the_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_ENGINE", "tpu")
    with pytest.raises(ValueError, match="no engine is named 'tpu'"):
        FusedBasicBlock(4, 4)(batch(2, 4, 5, 5))


def test_empty_environment_variable_prefers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_ENGINE", "")
    assert dispatch.forced() is None


def test_context_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_ENGINE", "reference")
    assert dispatch.forced() == "reference"
    with fusedres.engine("cpu"):
        assert dispatch.forced() == "cpu"


def test_reasons_of_engines_passed_over_are_kept(recorder: Recorder) -> None:
    with fusedres.engine("recorder"):
        choice = dispatch.choose("dbn", "cpu", torch.float16)
    assert choice.engine is not recorder
    assert choice.passed_over[0] == ("recorder", "it dislikes half")
    on_gpu = dispatch.choose("dbn", "cuda", torch.float64)
    assert ("triton", "it has no kernels for torch.float64") in on_gpu.passed_over
    assert ("cpu", "it computes on the CPU, the tensors are on cuda") in on_gpu.passed_over


def test_the_decision_looks_at_the_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dispatch._choose.cache_clear()
    assert dispatch.choose("conv_fprop", "cpu", torch.float32).engine is CPU


def test_an_op_that_nobody_computes_is_an_error_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ENGINES", {"cpu": CPU})
    dispatch._choose.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"no engine computes dbn for torch.float32 on cuda: .*the tensors are on cuda"
    ):
        dispatch.choose("dbn", "cuda", torch.float32)
    dispatch._choose.cache_clear()


def test_an_engine_names_an_op_that_it_lacks() -> None:
    with pytest.raises(AttributeError, match="the engine 'cpu' does not compute 'no_such_op'"):
        CPU.no_such_op  # noqa: B018


@pytest.mark.parametrize("kind", [FusedBasicBlock, FusedBottleneck])
def test_backward_runs_under_the_engine_of_its_forward(kind: type[torch.nn.Module], recorder: Recorder) -> None:
    block, x = kind(8, 8 // kind.expansion), batch(2, 8, 6, 5).requires_grad_()
    with fusedres.engine("recorder"):
        y = block(x)
    forward = len(recorder.asked)
    y.sum().backward()
    assert {"drelu_dbn", "conv_wgrad", "conv_dgrad"} <= set(recorder.asked[forward:])
    y = block(x)
    recorder.asked.clear()
    with fusedres.engine("recorder"):
        y.sum().backward()
    assert not recorder.asked


def test_stem_backward_runs_under_the_engine_of_its_forward(recorder: Recorder) -> None:
    model, x = fusedres.resnet18(), batch(2, 3, 32, 32)
    with fusedres.engine("recorder"):
        y = model._stem(x)
    recorder.asked.clear()
    y.sum().backward()
    assert {"bn_relu_maxpool_backward", "conv_wgrad"} <= set(recorder.asked)


@needs_native
def test_cpu_serves_every_op_where_the_native_library_is() -> None:
    for op in (name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "fusedres::" in name):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            choice = dispatch.choose(op, "cpu", dtype)
            assert choice == (CPU, tuple((name, NOT_ON_CUDA) for name in ("cuda", "cudnn", "triton")))


def test_package_without_native_library_trains_and_evaluates(without_native: Path) -> None:
    result = run_python(TRAIN_AND_EVALUATE + "print(fusedres.explain(block))", without_native)
    assert result.returncode == 0, result.stderr
    engine, _, explanation = result.stdout.partition("\n")
    assert engine == "reference"
    assert "cpu: the native library was not built" in explanation
    assert not result.stderr


def test_package_with_a_broken_native_library_says_so_and_works(without_native: Path) -> None:
    (without_native / "fusedres" / "_native.abi3.so").write_bytes(b"not a library")
    result = run_python(TRAIN_AND_EVALUATE + "print(fusedres.native.missing)", without_native)
    assert result.returncode == 0, result.stderr
    assert "_native.abi3.so does not load" in result.stdout


def test_package_without_triton_compiler_or_gpu_trains_and_evaluates(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None\n" + TRAIN_AND_EVALUATE
    result = run_python(code, PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["cpu" if native.missing is None else "reference"]
    assert not result.stderr


def test_triton_is_the_first_choice_on_cuda_or_says_why_not() -> None:
    choice = dispatch.choose("conv_fprop", "cuda", torch.float32)
    if TRITON.missing is None:
        assert choice.engine is TRITON
    else:
        assert choice.engine is REFERENCE
        assert ("triton", TRITON.missing) in choice.passed_over


def test_triton_stores_every_conv_output_so_that_it_closes_no_unit() -> None:
    reasons = dict(dispatch.choose("pointwise_dgrad", "cuda", torch.float32).passed_over)
    assert reasons["triton"] == "it stores every conv's output, so that it needs no such op"
    assert TRITON.flops_per_byte == 0
    assert dispatch.flops_per_byte("cpu", torch.float32) > 0


@pytest.mark.parametrize(("capability", "engine"), [((9, 0), "cudnn"), ((10, 0), "cudnn"), ((8, 0), "triton")])
def test_the_vendors_convs_come_first_on_gpus_like_those_they_were_measured_on(
    capability: tuple[int, int], engine: str
) -> None:
    if TRITON.missing is not None:
        pytest.skip(f"needs triton: {TRITON.missing}")
    with nvidia.planning(capability):
        assert dispatch.choose("conv_fprop", "cuda", torch.float16).engine.name == engine
        assert dispatch.fuses_prologue("conv_fprop", "cuda", torch.float16) == (engine == "triton")
        assert (dispatch.flops_per_byte("cuda", torch.bfloat16) > 0) == (engine == "cudnn")
        assert dispatch.choose("conv_fprop", "cuda", torch.float32).engine is TRITON


def test_forcing_triton_gives_cpu_tensors_no_interpreter_unless_the_environment_asked_for_it() -> None:
    with fusedres.engine("triton"):
        choice = dispatch.choose("dbn", "cpu", torch.float32)
    assert choice.passed_over[0] == ("triton", NOT_ON_CUDA)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_interpreter_serves_cpu_tensors_by_name_alone() -> None:
    code = """
import torch, fusedres
for name in (None, "triton"):
    with fusedres.engine(name):
        print(fusedres.dispatch.choose("dbn", "cpu", torch.float32).engine.name)
"""
    first, forced = run_python(code, TRITON_INTERPRET="1").stdout.split()
    assert first != "triton"
    assert forced == "triton"


def test_importing_and_running_on_the_cpu_imports_no_triton() -> None:
    code = "import sys, torch, fusedres; fusedres.FusedBasicBlock(4, 4)(torch.randn(2, 4, 5, 5)); "
    result = run_python(code + "print('fusedres.kernels' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_missing_triton_is_a_reason(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, fusedres
choice = fusedres.dispatch.choose("conv_fprop", "cuda", torch.float16)
print(choice.engine.name, dict(choice.passed_over)["triton"], sep=": ")
"""
    result = run_python(code)
    assert result.stdout.strip() == "reference: triton is not installed", result.stderr
