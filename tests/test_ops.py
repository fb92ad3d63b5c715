"""The ops as PyTorch sees them: schemas, fakes, mutation and aliasing."""

from __future__ import annotations

import copy

import pytest
import torch
from op_samples import Sample, samples, samples_of
from oracles import tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedres import ops

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = sorted({sample.op for sample in samples()})
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def one_shape(op: str, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """Every form of the operands of ``op``, on one shape."""
    chosen = list(samples_of(op, dtype))
    shape = chosen[0].label.partition("-")[0]
    return [s for s in chosen if s.label.partition("-")[0] == shape] if "-" in chosen[0].label else chosen


def call(sample: Sample) -> list[torch.Tensor]:
    results = getattr(torch.ops.fusedres, sample.op)(*sample.args)
    return [results] if isinstance(results, torch.Tensor) else list(results)


def call_fake(sample: Sample) -> list[torch.Tensor]:
    with FakeTensorMode() as mode:
        args = tuple(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in sample.args)
        return call(sample._replace(args=args))


def strides(t: torch.Tensor) -> list[int]:
    """Strides that matter: those of axes longer than 1."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def storages(values: list[torch.Tensor]) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in values if t.numel()]


def test_samples_cover_every_registered_op() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedres::")}
    assert registered == {f"fusedres::{op}" for op in OPS}


def test_bn_finalize_alone_declares_mutation() -> None:
    assert [op for op in OPS if getattr(ops, op)._schema.is_mutable] == ["bn_finalize"]


@pytest.mark.parametrize("op", OPS)
def test_op_passes_opcheck(op: str) -> None:
    for sample in one_shape(op):
        torch.library.opcheck(getattr(ops, op), copy.deepcopy(sample.args))


@pytest.mark.parametrize("op", OPS)
def test_fake_describes_what_the_op_returns(op: str, engine: str) -> None:
    for sample in samples_of(op):
        for real, fake in zip(call(copy.deepcopy(sample)), call_fake(sample), strict=True):
            described = fake.shape, fake.dtype, strides(fake)
            assert (real.shape, real.dtype, strides(real)) == described, sample.label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_dtypes_of_results_follow_the_activations(op: str, dtype: torch.dtype, engine: str) -> None:
    for sample in one_shape(op, dtype):
        dtypes = [real.dtype for real in call(copy.deepcopy(sample))]
        assert dtypes == [fake.dtype for fake in call_fake(sample)], sample.label


@pytest.mark.parametrize("op", OPS)
def test_op_mutates_only_the_running_statistics_of_bn_finalize(op: str, engine: str) -> None:
    declared = {3, 4, 5} if op == "bn_finalize" else set()
    for sample in samples_of(op):
        args = copy.deepcopy(sample.args)
        versions = [arg._version if isinstance(arg, torch.Tensor) else None for arg in args]
        call(sample._replace(args=args))
        for i, (before, after, version) in enumerate(zip(sample.args, args, versions, strict=True)):
            if isinstance(before, torch.Tensor):
                is_written = i in declared
                assert torch.equal(before, after) != is_written, f"{sample.label}, argument {i}"
                assert (after._version > version) == is_written, f"{sample.label}, argument {i}: autograd must know"


@pytest.mark.parametrize("op", OPS)
def test_results_alias_neither_operands_nor_each_other(op: str, engine: str) -> None:
    for sample in samples_of(op):
        results = storages(call(sample := copy.deepcopy(sample)))
        assert len(set(results)) == len(results), sample.label
        assert not set(results) & set(storages(tensors(sample.args))), sample.label


@pytest.mark.parametrize(
    "op", sorted(set(OPS) - {"bn_fold", "cast", "pointwise_wgrad"})
)  # these return weights as they got them
def test_activations_come_out_channels_last(op: str, engine: str) -> None:
    for sample in samples_of(op):
        for result in call(copy.deepcopy(sample)):
            if result.dim() == 4:
                assert result.is_contiguous(memory_format=torch.channels_last), sample.label


@pytest.mark.parametrize("op", OPS)
def test_op_is_bitwise_repeatable(op: str, engine: str) -> None:
    for sample in samples_of(op):
        for first, second in zip(call(copy.deepcopy(sample)), call(copy.deepcopy(sample)), strict=True):
            assert torch.equal(first, second), sample.label
