"""What one call of an op, of ATen or of fusedres, reads and writes: its launches with their bytes and FLOPs.

A launch reads each operand and writes each result once, except where a result depends on a sum over all of the input:
BN over a batch, forward and backward, reads twice. Of a strided pointwise convolution's input only the pixels that it
uses are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fusedres.flops  # noqa: F401  (the formulas of this package's ops)
from fusedres.measure import launches_of
from fusedres.problem import ConvProblem


class Call(NamedTuple):
    """One call that reached the dispatcher."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        return self.func._schema.name

    def named(self) -> dict[str, Any]:
        """The arguments by their names in the schema."""
        return dict(zip((a.name for a in self.func._schema.arguments), self.args, strict=False)) | self.kwargs


class Part(NamedTuple):
    """What one launch of a call does. ``writes_weight``: its first result is a weight or the gradient of one."""

    op: str
    reads: list[tuple[Tensor, int]]
    writes: list[Tensor]
    flops: int
    writes_weight: bool = False


class Traffic(NamedTuple):
    """Launches added up."""

    launches: int
    bytes: int
    flops: int


def traffic_of(fn: Callable[[], object]) -> Traffic:
    """What ``fn()`` launches, moves and multiplies, by all that passes the dispatcher below autograd."""
    with _Counter() as counter:
        fn()
    return Traffic(*counter.total)


class _Counter(TorchDispatchMode):
    """Adds up at once: tensors that lived on would take memory, and be copied by autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.total = [0, 0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if launches_of(func, args):
            for part in parts_of(Call(func, args, kwargs or {}, result)):
                moved = sum(nbytes for _, nbytes in part.reads) + sum(map(bytes_of, part.writes))
                self.total = [a + b for a, b in zip(self.total, (1, moved, part.flops), strict=True)]
        return result


#: Ops whose first result has the shape of a weight.
_WEIGHT_OPS = ("fusedres::conv_wgrad", "fusedres::pointwise_wgrad", "fusedres::bn_fold", "fusedres::cast")


def parts_of(call: Call) -> list[Part]:
    """The launches of a call: several of ``convolution_backward``, one of any other op."""
    named = call.named()
    if call.name == "aten::convolution_backward":
        return _conv_backward_parts(named, call.result)
    reads = _reads(call.name, named)
    writes = list(dict.fromkeys(_tensors(call.result)))
    return [Part(call.name, reads, writes, _flops(call), call.name in _WEIGHT_OPS)]


def _conv_backward_parts(named: dict[str, Any], result: tuple[Tensor | None, ...]) -> list[Part]:
    g, x, w = named["grad_output"], named["input"], named["weight"]
    problem = _eager_problem(named)
    operands = ((w, bytes_of(w)), (x, _touched(x, problem)), None)
    flops = (problem.flops, problem.flops, 0)
    names = ("dgrad", "wgrad", "bias")
    return [
        Part(
            f"aten::convolution_backward.{name}",
            [(g, bytes_of(g)), *([read] if read else [])],
            [y],
            count,
            name != "dgrad",
        )
        for name, read, count, y, wanted in zip(names, operands, flops, result, named["output_mask"], strict=True)
        if wanted and y is not None
    ]


def _reads(name: str, named: dict[str, Any]) -> list[tuple[Tensor, int]]:
    """Every tensor that the op reads, with the bytes it reads of it."""
    passes = _passes(name, named)
    found: list[tuple[Tensor, int]] = []
    if name == "fusedres_cpu::eval_chain" and named["packed"]:
        named = {**named, "weights": []}  # the packed ones are read
    for argument, value in named.items():
        for tensor in _tensors(value):
            nbytes = bytes_of(tensor)
            if argument in ("x", "input") and (problem := _problem(name, named)) is not None:
                nbytes = _touched(tensor, problem)
            if argument == "x_d":
                nbytes = _touched(tensor, ConvProblem.of(tensor, named["w_d"], named["stride_d"]))
            found.append((tensor, nbytes * (passes if tensor.dim() == 4 else 1)))
    return found


def _passes(name: str, named: dict[str, Any]) -> int:
    """How often an op reads its activations: twice where a sum over them comes first."""
    if name in ("aten::native_batch_norm", "aten::cudnn_batch_norm"):
        return 2 if named["training"] else 1
    if name == "aten::native_batch_norm_backward":
        return 2 if named["train"] else 1
    return 2 if name == "fusedres::bn_relu_maxpool_backward" and named["inv_count"] else 1


def _problem(name: str, named: dict[str, Any]) -> ConvProblem | None:
    """The convolution whose input ``x`` or ``input`` is; None where the op is none."""
    if name in ("fusedres::conv_fprop", "fusedres::pointwise_wgrad", "fusedres::pointwise_dgrad"):
        geometry = (
            named.get(k, v) for k, v in (("stride", 1), ("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1))
        )
        return ConvProblem.of(named["x"], named["w"], *geometry)
    if name == "fusedres::conv_wgrad":
        x, groups = named["x"], named["groups"]
        w = torch.Size((named["g"].shape[1], x.shape[1] // groups, *named["kernel_size"]))
        return ConvProblem.of(x, w, named["stride"], named["padding"], named["dilation"], groups)
    if name == "fusedres::input_moments":
        channels = named["x"].shape[1]
        return ConvProblem.of(named["x"], torch.Size((channels, channels, 1, 1)), named["stride"])
    return _eager_problem(named) if name == "aten::convolution" else None


def _eager_problem(named: dict[str, Any]) -> ConvProblem:
    geometry = (named[k] for k in ("stride", "padding", "dilation", "groups"))
    return ConvProblem.of(named["input"], named["weight"], *geometry)


def _touched(x: Tensor, problem: ConvProblem) -> int:
    """Bytes of ``x`` (N, C, H, W) under the taps of ``problem``: rows and columns that no tap meets stay unread."""
    rows = min(problem.H, problem.P * problem.R)
    columns = min(problem.W, problem.Q * problem.S)
    return problem.N * problem.C * rows * columns * x.element_size()


def _flops(call: Call) -> int:
    formula = flop_registry.get(call.func.overloadpacket)
    return formula(*call.args, **call.kwargs, out_val=call.result) if formula else 0


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for t in value if isinstance(t, Tensor)]
    return [value] if isinstance(value, Tensor) else []


def bytes_of(tensor: Tensor) -> int:
    """Of the elements, or of the memory behind them where an expanded tensor has less."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
