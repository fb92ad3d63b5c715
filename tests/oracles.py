"""What the tests compare with: shaken models, their eager twins, and the rule "error at most twice that of eager"."""

from __future__ import annotations

import copy
import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet as torchvision_resnet
from torchvision.ops import FrozenBatchNorm2d

import fusedres
from fusedres import native

ENGINES = ("reference", "cpu")

needs_native = pytest.mark.skipif(native.missing is not None, reason=f"needs the native library: {native.missing}")

#: torchvision's block for each fused one.
EAGER_BLOCKS = {
    fusedres.FusedBasicBlock: torchvision_resnet.BasicBlock,
    fusedres.FusedBottleneck: torchvision_resnet.Bottleneck,
}


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BN of ``module`` statistics and parameters that no mistake can hide behind; returns ``module``."""
    generator = torch.Generator().manual_seed(seed)
    for bn in module.modules():
        if not isinstance(bn, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            continue
        with torch.no_grad():
            if bn.running_mean is not None:
                bn.running_mean.copy_(0.1 * torch.randn(bn.running_mean.shape, generator=generator))
                bn.running_var.copy_(0.5 + torch.rand(bn.running_var.shape, generator=generator))
            if bn.weight is not None:
                bn.weight.copy_(1 + 0.3 * torch.randn(bn.weight.shape, generator=generator))
                bn.bias.copy_(0.1 * torch.randn(bn.bias.shape, generator=generator))
    return module


def projection(inplanes: int, planes: int, stride: int, norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d) -> Any:
    """torchvision's downsample: a 1x1 conv and its norm."""
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), norm_layer(planes))


def block_twins(
    kind: type[nn.Module], inplanes: int, planes: int, stride: int = 1, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """(fused, eager): a shaken fused block and torchvision's with the same state, a projection where shapes differ."""
    memory = {"memory": kwargs.pop("memory")} if "memory" in kwargs else {}
    norm_layer = kwargs.get("norm_layer") or nn.BatchNorm2d
    downsample = kwargs.pop("downsample", None)
    outplanes = planes * kind.expansion
    if downsample is None and (stride != 1 or inplanes != outplanes):
        downsample = projection(inplanes, outplanes, stride, norm_layer)
    eager = shake(EAGER_BLOCKS[kind](inplanes, planes, stride, downsample, **kwargs))
    fused = kind(inplanes, planes, stride, copy.deepcopy(downsample), **kwargs, **memory)
    fused.load_state_dict(eager.state_dict(), strict=True)
    return fused, eager


def batch(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """A normal channels_last batch (N, C, H, W)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def step(
    module: nn.Module,
    x: Tensor,
    rounding: torch.dtype | None = None,
    needs_dx: bool = True,
    dy_format: torch.memory_format = torch.channels_last,
) -> dict[str, Tensor]:
    """Everything that a forward and backward of a copy of ``module`` computes: output, gradients, buffers after it.

    The gradient at the output is the same for every module of that output shape, rounded to ``rounding``. Without
    ``needs_dx`` the input needs no gradient; where nothing needs one there is no backward.
    """
    module = copy.deepcopy(module)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_dx and x.is_floating_point())
    y = module(x)
    if y.requires_grad:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        y.backward(dy.to(rounding or y.dtype).to(y.dtype).contiguous(memory_format=dy_format))
    gradients = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    return {
        "y": y.detach(),
        **{f"{name}.grad": grad for name, grad in gradients.items() if grad is not None},
        **dict(module.named_buffers()),
    }


Results = Mapping[str, Tensor]


def assert_accurate(
    *draws: tuple[Results, Results, Results],
    stored: torch.dtype | None = None,
    slack: Mapping[str, float] | None = None,
) -> None:
    """Every fused result has eager's shape and dtype, and at most twice eager's error against float64.

    ``draws``: (fused, eager, exact) results, once or for several inputs. Errors are root-mean-square over a tensor, and
    the median over the draws: where half rounding turns the sign of a value before a ReLU, a gradient is off by that
    entry, in eager as in fused, but seldom in the same draw. The floor is one rounding of the result in the dtype that
    activations are ``stored`` in, by default its own. ``slack``: what is allowed each result beyond that.
    """
    excesses = []
    for name in draws[0][1]:
        errors = [_errors(name, stored, *(results[name] for results in draw)) for draw in draws]
        ours, theirs, floor = (statistics.median(column) for column in zip(*errors, strict=True))
        floor += slack[name] if slack else 0.0
        if not ours <= 2 * theirs + floor:
            excesses.append(f"{name}: error {ours:.3g}, eager's {theirs:.3g}, floor {floor:.3g}")
    assert not excesses, "\n".join(excesses)


def assert_as_exact_as_eager(actual: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """At most twice the error of eager, or a few roundings of the largest value: many in float64, as the oracle's.

    Of single entries, where ``assert_accurate`` looks at means.
    """
    if not oracle.numel():
        return
    floor = (64 if actual.dtype == torch.float64 else 4) * torch.finfo(actual.dtype).eps * oracle.abs().max()
    assert (actual.double() - oracle).abs().max() <= max(2 * (eager.double() - oracle).abs().max(), floor)


def _errors(
    name: str, stored: torch.dtype | None, ours: Tensor, theirs: Tensor, truth: Tensor
) -> tuple[float, float, float]:
    """(error, eager's error, floor) of one result."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs), name
        return 0.0, 0.0, 0.0
    assert torch.equal(ours.isnan(), truth.isnan()), f"{name}: other values are NaN"
    floor = torch.finfo(stored or ours.dtype).eps * rms(truth)
    return rms(ours.double() - truth), rms(theirs.double() - truth), floor


def rms(t: Tensor) -> float:
    """Root mean square of the entries that are numbers."""
    return t.double().nan_to_num(0).square().mean().sqrt().item() if t.numel() else 0.0


def step_results(fused: nn.Module, eager: nn.Module, x: Tensor) -> tuple[Results, Results, Results]:
    """A step (fused, eager, exact) of twins in the dtype of ``x``, or under autocast if that is on."""
    rounding = rounding_of(x)
    with torch.autocast("cpu", enabled=False):
        exact = step(copy.deepcopy(eager).double(), x.double(), rounding)
    return step(fused, x), step(eager, x), exact


def rounding_of(x: Tensor) -> torch.dtype:
    """The dtype of what a block makes of ``x``: autocast's if that is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def output_results(fused: nn.Module, eager: nn.Module, x: Tensor) -> tuple[Results, Results, Results]:
    """The outputs alone, without gradients."""
    with torch.no_grad():
        return {"y": fused(x)}, {"y": eager(x)}, {"y": copy.deepcopy(eager).double()(x.double())}


def assert_steps_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Results in float64 agree to ``tolerance`` of their largest entry."""
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        if expected.is_floating_point():
            atol = tolerance * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=atol, msg=functools.partial(_named, name))
        else:
            assert torch.equal(ours[name], expected), name


def _named(name: str, message: str) -> str:
    return f"{name}: {message}"


class _OpRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def ops_called(fn: Callable[[], object]) -> Counter[str]:
    """How often ``fn()`` calls each op, as the dispatcher names them ("aten::convolution", "fusedres::conv_fprop")."""
    with _OpRecorder() as recorder:
        fn()
    return recorder.calls


def is_fused(fn: Callable[[], object]) -> bool:
    """Whether ``fn()`` calls any op of fusedres or none of ATen's modules' own: nothing ran module by module."""
    calls = ops_called(fn)
    return not any(
        name.startswith(("aten::convolution", "aten::native_batch_norm", "aten::batch_norm")) for name in calls
    )


def saved_maps(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The activations (no parameters) that ``module(x)`` keeps for backward, one for each storage, in order."""
    saved: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage().data_ptr()
        if t.dim() == 4 and storage not in parameters:
            saved.setdefault(storage, t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)  # the graph must live while storages are told apart by their addresses
    del y
    return list(saved.values())


def identity_conv_(conv: nn.Conv2d) -> None:
    """Make a 3x3 ``conv`` pass its input on, bit for bit."""
    with torch.no_grad():
        conv.weight.zero_()
        for i in range(min(conv.weight.shape[:2])):
            conv.weight[i, i, 1, 1] = 1


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among ``values``."""
    return [v for v in values if isinstance(v, Tensor)]
