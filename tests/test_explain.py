"""What ``explain`` and ``reason`` tell: the engine of every block, and why not another."""

from __future__ import annotations

import pytest
import torch
from oracles import block_twins, needs_native
from torch import nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, explain, tuning


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = FusedConvBNReLU(3, 8)
        self.stages = nn.Sequential(FusedBasicBlock(8, 8), block_twins(FusedBottleneck, 8, 4, 2)[0])
        self.head = nn.Linear(16, 2)


def test_every_fused_module_has_a_row_in_order() -> None:
    rows = explain(Network())
    assert [(row.name, row.kind) for row in rows] == [
        ("stem", "FusedConvBNReLU"),
        ("stages.0", "FusedBasicBlock"),
        ("stages.1", "FusedBottleneck"),
    ]


@needs_native
def test_only_the_engines_for_gpus_are_passed_over_on_a_cpu_with_the_native_library() -> None:
    engines = ("cuda", "cudnn", "triton")
    reason = "; ".join(f"{e}: it computes on CUDA devices, the tensors are on cpu" for e in engines)
    assert {(row.engine, row.folded, row.reason) for row in explain(Network())} == {("cpu", "cpu", reason)}


def test_preferred_engine_is_named() -> None:
    with fusedres.engine("reference"):
        assert {row.engine for row in explain(Network())} == {"reference"}


def test_where_nothing_was_tuned_rows_are_the_same_within_autotune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no Triton
    tuning._environment.cache_clear()
    try:
        with fusedres.autotune():
            inside = explain(Network())
    finally:
        tuning._environment.cache_clear()
    assert inside == explain(Network())


def test_a_lone_block_is_explained_under_its_own_name() -> None:
    (row,) = explain(FusedBasicBlock(8, 8))
    assert (row.name, row.kind) == ("", "FusedBasicBlock")


def test_models_without_fused_modules_have_no_rows() -> None:
    assert explain(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("norm_layer", [lambda c: nn.GroupNorm(2, c), nn.InstanceNorm2d], ids=["group", "instance"])
def test_another_norm_runs_eagerly_and_says_so(norm_layer: type[nn.Module]) -> None:
    (row,) = explain(FusedBottleneck(8, 2, norm_layer=norm_layer))
    assert row.engine == "eager"
    assert "is not exactly BatchNorm2d" in row.reason


def test_a_hook_runs_eagerly_and_says_so() -> None:
    network = Network()
    network.stages[0].bn2.register_forward_hook(lambda *_: None)
    rows = {row.name: row for row in explain(network)}
    assert rows["stages.0"].engine == "eager"
    assert rows["stages.0"].reason == "a hook is attached to a BatchNorm2d"
    assert rows["stages.1"].engine != "eager"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d[0].register_forward_hook(lambda *_: None), "a hook is attached to a Conv2d"),
        (lambda d: d.register_forward_hook(lambda *_: None), "a hook is attached to a Sequential"),
        (lambda d: d.append(nn.Dropout()), "3 modules"),
        (lambda d: d.__setitem__(1, nn.GroupNorm(2, 16)), "GroupNorm"),
    ],
    ids=["conv", "sequential", "longer", "norm"],
)
def test_a_downsample_that_runs_by_itself_says_so(change: object, said: str) -> None:
    block = block_twins(FusedBottleneck, 8, 4, 2)[0]
    change(block.downsample)
    (row,) = explain(block)
    assert row.engine != "eager"
    assert "downsample" in row.reason
    assert said in row.reason


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_dtype_and_device_are_those_of_the_parameters() -> None:
    (row,) = explain(FusedBasicBlock(8, 8).to("meta"))
    assert row.engine == "reference"
    assert "cpu: it computes on the CPU, the tensors are on meta" in row.reason
    (row,) = explain(FusedBasicBlock(8, 8).to(torch.complex64))
    assert "cpu: it has no kernels for torch.complex64" in row.reason
