"""What the ``cuda`` engine would serve, and the reasons why it does not, judged from sizes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fusedres
from fusedres import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, dispatch, native
from fusedres.account import built_in_chain
from fusedres.engines.block_kernels import Chain, form_reason, kernel_of, size_reason, stem_weight
from fusedres.engines.cuda import CUDA
from fusedres.explain import _outline

KIB = 1 << 10


def outline(block: FusedBasicBlock | FusedBottleneck | FusedConvBNReLU) -> Chain:
    """The kind of chain that ``block`` folds to."""
    return _outline(built_in_chain(block))


def bottleneck(inplanes: int = 64, planes: int = 16, stride: int = 1, **kwargs: int) -> Chain:
    return outline(FusedBottleneck(inplanes, planes, stride, projected(inplanes, 4 * planes, stride), **kwargs))


def projected(inplanes: int, outplanes: int, stride: int, kernel: int = 1) -> nn.Module | None:
    if stride == 1 and inplanes == outplanes and kernel == 1:
        return None
    conv = nn.Conv2d(inplanes, outplanes, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outplanes))


def stem(channels: int = 3, pool: tuple[int, int, int] | None = (3, 2, 1), stride: int = 2) -> Chain:
    return replace(outline(FusedConvBNReLU(channels, 64, 7, stride)), pool=pool)


def cifar_stem(channels: int = 3, stride: int = 1) -> Chain:
    return outline(FusedConvBNReLU(channels, 16, 3, stride))


@pytest.mark.parametrize(
    ("chain", "kernel"),
    [
        (bottleneck(), "bottleneck_fprop"),
        (bottleneck(64, 32, 2), "bottleneck_fprop"),
        (outline(FusedBasicBlock(8, 8)), "basic_block_fprop"),
        (outline(FusedBasicBlock(8, 16, 2, projected(8, 16, 2))), "basic_block_fprop"),
        (stem(), "stem_fprop"),
        (stem(1), "stem_fprop"),
        (cifar_stem(), "stem_fprop"),
        (cifar_stem(1), "stem_fprop"),
    ],
)
def test_blocks_and_stems_have_a_kernel(chain: Chain, kernel: str) -> None:
    assert kernel_of(chain) == kernel
    assert form_reason(chain) is None
    assert size_reason(chain, 227 * KIB, lambda *_: 100 * KIB) is None


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (outline(FusedConvBNReLU(8, 8, 1)), "sequence of convs"),
        (bottleneck(64, 16, groups=4, base_width=32), "groups"),
        (bottleneck(64, 16, dilation=2), "padding or dilation"),
        (bottleneck(64, 16, 3), "such strides"),
        (outline(FusedBasicBlock(8, 16, 2, projected(8, 16, 1))), "such a projection"),
        (outline(FusedBasicBlock(8, 16, 2, projected(8, 16, 2, 3))), "such a projection"),
        (outline(FusedBasicBlock(8, 16, 1, nn.Sequential(nn.Conv2d(8, 16, 1)))), "neither its input nor a projection"),
        (replace(bottleneck(), relu=False), "ends in a ReLU"),
        (replace(bottleneck(), pool=(3, 2, 1)), "ends in a ReLU"),
        (stem(pool=None), "7x7 conv of stride 2"),
        (stem(pool=(2, 2, 0)), "7x7 conv of stride 2"),
        (stem(stride=1), "7x7 conv of stride 2"),
        (replace(stem(), relu=False), "7x7 conv of stride 2"),
        (stem(5), "takes 4 channels, not 5"),
        (cifar_stem(5), "takes 4 channels, not 5"),
        (cifar_stem(stride=2), "3x3 conv of stride 1"),
        (replace(cifar_stem(), pool=(3, 2, 1)), "3x3 conv of stride 1"),
        (replace(cifar_stem(), relu=False), "3x3 conv of stride 1"),
        (replace(cifar_stem(), given=True), "3x3 conv of stride 1"),
    ],
)
def test_what_no_kernel_computes_is_named(chain: Chain, reason: str) -> None:
    found = form_reason(chain)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (bottleneck(48, 12), "multiples of 8, not 12"),
        (bottleneck(36, 16), "multiples of 8, not 36"),
        (bottleneck(2048, 512), "widths to 256, not 512"),
        (outline(FusedBasicBlock(256, 256)), "widths to 128, not 256"),
        (bottleneck(512, 128, 2), "width 128 and stride 2 needs 999999 bytes of shared memory of 232448"),
    ],
)
def test_channels_that_no_tile_takes_are_named(chain: Chain, reason: str) -> None:
    found = size_reason(chain, 227 * KIB, lambda *_: 999999)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(("dtype", "served"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_only_half_dtypes_on_cuda_are_served(dtype: torch.dtype, served: bool) -> None:
    reason = CUDA._tensor_reason("cuda", dtype)
    assert (reason == f"it has no kernels for {dtype}") == (not served)
    assert CUDA._tensor_reason("cpu", dtype) == "it computes on CUDA devices, the tensors are on cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_tails_are_served_by_name_alone_and_convs_never(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDA, "missing", None)
    dispatch._choose.cache_clear()
    served = dtype != torch.float64
    try:
        for op in ("scale_shift_add_relu", "drelu_dbn", "dbn", "bn_finalize"):
            with fusedres.engine("cuda"):
                assert (dispatch.choose(op, "cuda", dtype).engine is CUDA) == served
            unnamed = dispatch.choose(op, "cuda", dtype)
            assert unnamed.engine is not CUDA
            reason = "nobody has measured its tails on a GPU" if served else "it has no kernels for torch.float64"
            assert unnamed.passed_over[0] == ("cuda", reason)
        with fusedres.engine("cuda"):
            for op in ("conv_fprop", "conv_dgrad", "conv_wgrad", "bn_fold"):
                assert dispatch.choose(op, "cuda", dtype).engine is not CUDA
    finally:
        dispatch._choose.cache_clear()


def test_a_library_without_cuda_kernels_is_a_reason() -> None:
    if native.missing_cuda is None:
        assert CUDA.rejects("conv_fprop", "cuda", torch.float16) is not None
    else:
        assert CUDA.rejects("conv_fprop", "cuda", torch.float16) == native.missing_cuda


def test_every_block_of_a_cpu_network_says_that_the_engine_is_for_gpus() -> None:
    for row in fusedres.explain(FusedBottleneck(64, 16).half()):
        assert "cuda: it computes on CUDA devices, the tensors are on cpu" in row.reason


def test_only_the_stem_that_was_measured_is_served_without_being_named() -> None:
    assert CUDA.folded_only_by_name(stem()) is None
    assert CUDA.folded_only_by_name(cifar_stem()) == "nobody has measured it on a GPU"


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_stems_weight_is_padded_with_zeros(channels: int, size: int) -> None:
    w = torch.randn(8, channels, size, size)
    padded = stem_weight(w)
    assert padded.shape == (8, 4, size, size + 1)
    assert padded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(padded[:, :channels, :, :size], w)
    assert padded.count_nonzero() == w.count_nonzero()
