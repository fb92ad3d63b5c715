"""Blocks of any geometry, dtype, memory format, mode, frozen part and hook against eager, drawn by hypothesis.

The default run draws few and always the same; ``--hypothesis-profile=soak`` draws new ones for as long as `make soak`
takes. What once failed is kept as an ``@example``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st
from networks import decide_relus
from oracles import ENGINES, block_twins, rounding_of, shake, step
from sensitivity import Run, assert_as_eager, outputs
from torch import Tensor, nn

import fusedres
from fusedres.functional import stem

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSALS = (RuntimeError, ValueError, TypeError)
BLOCKS = {"basic": fusedres.FusedBasicBlock, "bottleneck": fusedres.FusedBottleneck}
WIDEST = 130

#: Of each dtype some roundings, relative: how far inputs are moved to see how far results move with them. Decided ReLUs
#: (all dtypes but float64) work on values around 10 whose differences count, of which half dtypes keep few digits.
WIGGLES = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2**-4, "float16": 2**-7, "autocast": 2**-4}

#: Not in half dtypes: where channels are odd, oneDNN's bfloat16 convs on channels_last carry NaN to the next pixel.
POISONS = [float("nan"), float("inf"), float("-inf")]

HOOKS: dict[str, Any] = {
    "forward": lambda module: module.register_forward_hook(lambda _, args, y: 0.5 * y),
    "forward_pre": lambda module: module.register_forward_pre_hook(lambda _, args: (0.5 * args[0],)),
    "backward": lambda module: module.register_full_backward_hook(
        lambda _, dx, dy: tuple(None if t is None else 0.5 * t for t in dx)
    ),
}

FORMATS: dict[str, Any] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@dataclass(frozen=True)
class Case:
    """A block, layer or stem, its input ``shape`` (N, C, H, W), and how it is run. The switches of BNs, parameters and
    hooks go round: the first is that of the first module of the kind."""

    kind: str
    shape: tuple[int, int, int, int]
    planes: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    kernel: int = 3
    padding: int | None = None
    bias: bool = False
    relu: bool = True
    memory: str = "standard"
    affine: bool = True
    tracks: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    engine: str = "cpu"
    dtype: str = "float64"
    x_format: str = "channels_last"
    dy_is_channels_last: bool = True
    needs_dx: bool = True
    trains: tuple[bool, ...] = (True,)
    frozen: tuple[bool, ...] = (False,)
    hook: tuple[str, int] | None = None
    poison: float | None = None  # one entry of the input

    def norm(self, channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, self.eps, self.momentum, self.affine, self.tracks)


class Stem(nn.Module):
    """The stem of a ResNet; ``fused`` or called module by module."""

    def __init__(self, case: Case, fused: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(case.shape[1], case.planes, case.kernel, case.stride, case.kernel // 2, bias=case.bias)
        self.bn, self.relu = case.norm(case.planes), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, case.dilation, 1)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return stem(x, self.conv, self.bn, self.relu, self.pool)
        return self.pool(self.relu(self.bn(self.conv(x))))


@st.composite
def cases(draw: Any) -> Case:
    kind = draw(st.sampled_from(["basic", "bottleneck", "layer", "stem"]))
    small = st.integers(1, 3)
    size = [draw(st.integers(0, 5)), draw(st.integers(1, 17)), draw(st.integers(1, 17))]
    groups = draw(st.sampled_from([1, 1, 2, 4, 7])) if kind in ("bottleneck", "layer") else 1
    widest = {"bottleneck": WIDEST // 4 // groups, "layer": WIDEST // groups}.get(kind, WIDEST)
    planes = draw(st.integers(1, widest)) * (groups if kind == "layer" else 1)
    expansion = 4 if kind == "bottleneck" else 1
    channels = st.integers(1, widest).map(lambda c: c * groups) if kind == "layer" else st.integers(1, WIDEST)
    if kind != "stem":  # half of them of the width of the output, so that the shortcut is the input itself
        channels = st.one_of(st.just(planes * expansion), channels)
    dtype = draw(st.sampled_from(["float64", "float64", *WIGGLES]))
    hook = draw(st.one_of(st.none(), st.none(), st.tuples(st.sampled_from(sorted(HOOKS)), st.integers(0, 7))))
    switches = st.lists(st.booleans(), min_size=1, max_size=4).map(tuple)
    return Case(
        kind,
        (size[0], draw(channels), size[1], size[2]),
        planes,
        stride=draw(small),
        dilation=1 if kind == "basic" else draw(small),
        groups=groups,
        kernel=draw(st.sampled_from({"layer": [1, 3, 2, 5], "stem": [7, 3]}.get(kind, [3]))),
        padding=draw(st.one_of(st.none(), st.integers(0, 3))) if kind == "layer" else None,
        bias=draw(st.booleans()) and kind in ("layer", "stem"),
        relu=draw(st.booleans()) or kind != "layer",
        memory=draw(st.sampled_from(["standard", "recompute"])),
        affine=dtype != "float64" or draw(st.booleans()),
        tracks=draw(st.sampled_from([True, True, False])),
        momentum=draw(st.sampled_from([0.1, None, 1.0, 0.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        engine=draw(st.sampled_from(["cpu", *ENGINES])),
        dtype=dtype,
        x_format=draw(st.sampled_from(sorted(FORMATS))),
        dy_is_channels_last=draw(st.booleans()),
        needs_dx=draw(st.sampled_from([True, True, False])),
        trains=draw(switches),
        frozen=draw(st.one_of(st.just((False,)), switches)),
        hook=hook,
        poison=draw(st.sampled_from([None] * 4 + POISONS)) if dtype in ("float64", "float32") else None,
    )


def twins(case: Case) -> tuple[nn.Module, nn.Module]:
    """(fused, eager) with one state."""
    if case.kind == "stem":
        fused, eager = Stem(case, True), Stem(case, False)
    elif case.kind == "layer":
        geometry = case.kernel, case.stride, case.padding, case.dilation, case.groups
        options = {"bias": case.bias, "relu": case.relu, "norm_layer": case.norm, "memory": case.memory}
        fused = fusedres.FusedConvBNReLU(case.shape[1], case.planes, *geometry, **options)
        eager = nn.Sequential(OrderedDict(copy.deepcopy(fused).named_children()))
    else:
        options = {"groups": case.groups, "dilation": case.dilation, "norm_layer": case.norm, "memory": case.memory}
        fused, eager = block_twins(BLOCKS[case.kind], case.shape[1], case.planes, case.stride, **options)
    shake(eager)
    if case.dtype != "float64":
        decide_relus(eager)
    eager.to(torch.float32 if case.dtype == "autocast" else getattr(torch, case.dtype))
    fused.to(next(eager.parameters()).dtype).load_state_dict(eager.state_dict())
    for module in (fused, eager):
        _configure(module, case)
    return fused, eager


def _configure(module: nn.Module, case: Case) -> None:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for i, bn in enumerate(norms):
        bn.train(case.trains[i % len(case.trains)])
    for i, p in enumerate(module.parameters()):
        p.requires_grad_(not case.frozen[i % len(case.frozen)])
    if case.hook is not None:
        hook, target = case.hook
        children = list(module.children())
        HOOKS[hook](children[target % len(children)])


def input_of(case: Case) -> Tensor:
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dtype = torch.float32 if case.dtype == "autocast" else getattr(torch, case.dtype)
    if case.poison is not None and len(x):
        x[0, -1, 0, -1] = case.poison
    return FORMATS[case.x_format](x.to(dtype))


def assert_refused(fused: nn.Module, x: Tensor) -> None:
    """A bad call raises, before any statistics have moved."""
    before = {name: buffer.clone() for name, buffer in fused.named_buffers()}
    with pytest.raises(REFUSALS) as caught:
        fused(x)
    assert str(caught.value)
    assert all(torch.equal(buffer, before[name]) for name, buffer in fused.named_buffers())


def assert_poison_spreads(fused: nn.Module, eager: nn.Module, x: Tensor, run: Run) -> None:
    """NaN and infinity are where eager has them; in a parameter's gradient they are if anywhere in eager's.

    Eager's own backends differ in whether the taps of a weight that see nothing but padding get a NaN.
    """
    ours, theirs = run(fused, x), run(eager, x)
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        for is_poison in (torch.isnan, torch.isinf):
            mine, other = is_poison(ours[name]), is_poison(expected)
            if name.endswith(".grad") and name != "x.grad":
                mine, other = (ours[name].isfinite().all(), expected.isfinite().all())
            assert torch.equal(mine, other), f"{name}: {is_poison.__name__} elsewhere"


@given(cases())
@example(Case("layer", (2, 4, 4, 5), 4, relu=False, hook=("forward_pre", 2)))
@example(Case("layer", (2, 4, 5, 5), 6, bias=True, poison=float("nan")))
@example(Case("layer", (4, 21, 4, 1), 63, stride=2, groups=7, dtype="bfloat16"))
@example(Case("basic", (0, 4, 5, 5), 4, dtype="autocast"))
@example(Case("basic", (1, 4, 1, 1), 4))
@example(Case("layer", (2, 4, 5, 5), 6, bias=True, trains=(False,)))
@example(Case("bottleneck", (2, 8, 5, 5), 2, hook=("forward", 1)))
@example(  # variances that are zero: rounding times 1 / eps
    Case("bottleneck", (2, 4, 1, 1), 1, groups=2, tracks=False, x_format="expanded", needs_dx=False, trains=(False,))
)
def test_block_computes_what_eager_computes_and_refuses_what_eager_refuses(case: Case) -> None:
    torch.manual_seed(0)
    fused, eager = twins(case)
    x = input_of(case)
    before = x.clone()
    with fusedres.engine(case.engine), torch.autocast("cpu", torch.bfloat16, case.dtype == "autocast"):
        dy_format = torch.channels_last if case.dy_is_channels_last else torch.contiguous_format
        run = partial(step, rounding=rounding_of(x), needs_dx=case.needs_dx, dy_format=dy_format)
        try:
            run(eager, x)
        except REFUSALS:
            event("refused")
            if case.hook is None:  # an add in place does not suit eager's backward hooks, but ours is none
                assert_refused(fused, x)
            return
        event(f"{case.kind}, {case.dtype}")
        if case.poison is None:
            check = partial(assert_as_eager, fused, eager, x, wiggle=WIGGLES[case.dtype], stored=rounding_of(x))
        else:
            check = partial(assert_poison_spreads, fused, eager, x)
        check(run)
        check(outputs)
        check(outputs)  # finds what the call before folded
        for p in (*fused.parameters(), *eager.parameters()):
            p.data.mul_(1.25)
        check(outputs)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
