"""Random calls of every native op: right ones, and right ones of which something was spoiled.

A call is right by its op's own schema and checks; whatever is spoiled must be refused or served, but never read or
written beyond its memory.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.layout import acc_dtype
from fusedres.problem import out_size

CL = torch.channels_last
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONV_FLOATS = FLOATS[:2]
OTHER_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2)
NUMBERS = (-1, 0, 1, 2, 3, 16, 17, 2**20, 2**30, 2**31, 2**40, 2**62, -(2**63))


class Call(NamedTuple):
    """One call of ``torch.ops.fusedres_cpu.<op>``; ``spoiled`` says what is wrong with it, if anything.

    ``refusal``: what the error must say, where one is due.
    """

    op: str
    args: tuple[Any, ...]
    spoiled: tuple[str, ...] = ()
    refusal: str = ""

    def run(self) -> Any:
        return getattr(torch.ops.fusedres_cpu, self.op)(*self.args)

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(_text, self.args))}) [{'; '.join(self.spoiled) or 'right'}]"


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{value.dtype} {tuple(value.shape)} {strides} {value.device}"
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else repr(value)


class Draw:
    """Random operands."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(32))

    def one_of(self, *values: Any) -> Any:
        return self.random.choice(values)

    def maybe(self, value: Any) -> Any:
        return value if self.random.random() < 0.5 else None

    def size(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)"""
        draw = self.random.randint
        side = (draw(25, 31), draw(20, 26)) if draw(0, 7) == 0 else (draw(1, 9), draw(1, 9))
        return draw(0, 3), self.one_of(draw(1, 20), draw(1, 70), 130), *side

    def tensor(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=self.generator).to(dtype)

    def map(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.tensor(*size, dtype=dtype).contiguous(memory_format=CL)

    def rows(self, rows: int, channels: int, dtype: torch.dtype) -> Tensor:
        return self.tensor(rows, channels, dtype=acc_dtype(dtype))

    def geometry(self, size: tuple[int, ...], kernel: tuple[int, int] | None = None) -> tuple[list[int], ...]:
        """(kernel, stride, padding, dilation) of a conv that fits into a map of ``size``."""
        draw = self.random.randint
        while True:
            window = list(kernel) if kernel else self.one_of([1, 1], [3, 3], [draw(1, 4), draw(1, 7)])
            stride = self.one_of([1, 1], [draw(1, 3), draw(1, 3)])
            dilation = [draw(1, 3), draw(1, 2)]
            padding = [draw(0, 3), draw(0, 3)]
            if min(outputs(size, window, stride, padding, dilation)) > 0:
                return window, stride, padding, dilation
            kernel = (1, 1) if kernel is None else kernel


def outputs(size: tuple[int, ...], kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, int]:
    """(P, Q)"""
    p, q = (out_size(*axis) for axis in zip(size[2:], kernel, stride, padding, dilation, strict=True))
    return p, q


# One function an op: the arguments of a right call.


def channel_stats(d: Draw) -> tuple[Any, ...]:
    return (d.map(d.size(), d.one_of(*FLOATS)),)


def bn_finalize(d: Draw) -> tuple[Any, ...]:
    k, dtype = d.size()[1], d.one_of(*CONV_FLOATS)
    vectors = [d.maybe(d.tensor(k, dtype=dtype)) for _ in range(4)]
    return d.rows(3, k, dtype), *vectors, d.maybe(torch.tensor(3)), d.one_of(None, 0.1), 1e-5


def scale_shift_add_relu(d: Draw) -> tuple[Any, ...]:
    size, dtype = d.size(), d.one_of(*FLOATS)
    residual = d.maybe(d.map(size, dtype))
    residual_bn = None if residual is None else d.maybe(d.rows(4, size[1], dtype))
    return d.map(size, dtype), d.rows(4, size[1], dtype), residual, residual_bn, d.one_of(True, False)


def drelu_dbn(d: Draw) -> tuple[Any, ...]:
    size, dtype = d.size(), d.one_of(*FLOATS)
    branches = [d.maybe((d.map(size, dtype), d.rows(4, size[1], dtype))) or (None, None) for _ in range(2)]
    return d.map(size, dtype), d.maybe(d.map(size, dtype)), *branches[0], *branches[1]


def drelu_dbn_(d: Draw) -> tuple[Any, ...]:
    size, dtype = d.size(), d.one_of(*FLOATS)
    return d.map(size, dtype), d.map(size, dtype), d.rows(4, size[1], dtype)


def drelu_dbn_by_output_(d: Draw) -> tuple[Any, ...]:
    dy, y, *branches = drelu_dbn(d)
    return dy, dy.clone(memory_format=torch.preserve_format) if y is None else y, *branches


def dbn(d: Draw) -> tuple[Any, ...]:
    size, dtype = d.size(), d.one_of(*FLOATS)
    return d.map(size, dtype), d.map(size, dtype), d.rows(4, size[1], dtype), d.rows(2, size[1], dtype), 0.1


def _pool(d: Draw, size: tuple[int, ...]) -> tuple[int, int, int]:
    kernel = d.random.randint(1, min(*size[2:], 5))
    return kernel, d.random.randint(1, 3), d.random.randint(0, kernel // 2)


def bn_relu_maxpool(d: Draw) -> tuple[Any, ...]:
    size, dtype = d.size(), d.one_of(*FLOATS)
    return d.map(size, dtype), d.rows(4, size[1], dtype), *_pool(d, size)


def bn_relu_maxpool_backward(d: Draw) -> tuple[Any, ...]:
    z, bn, kernel, stride, padding = bn_relu_maxpool(d)
    out = (*z.shape[:2], *outputs(z.shape, [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1]))
    tap = torch.randint(0, 256, out, dtype=torch.uint8, generator=d.generator).contiguous(memory_format=CL)
    return d.map(out, z.dtype), tap, z, bn, kernel, stride, padding, 0.1


def _weight(d: Draw, k: int, c: int, kernel: list[int], dtype: torch.dtype) -> Tensor:
    w = d.tensor(k, c, *kernel, dtype=dtype)
    return d.one_of(w, w.contiguous(memory_format=CL), w.transpose(2, 3).contiguous().transpose(2, 3))


def conv_pack(d: Draw) -> tuple[Any, ...]:
    size, k = d.size(), d.size()[1]
    kernel, *geometry = d.geometry(size)
    return _weight(d, k, size[1], kernel, d.one_of(*CONV_FLOATS)), list(size[2:]), *geometry


def conv_fprop(d: Draw) -> tuple[Any, ...]:
    size, dtype, k = d.size(), d.one_of(*CONV_FLOATS), d.size()[1]
    kernel, stride, padding, dilation = d.geometry(size)
    w = _weight(d, k, size[1], kernel, dtype)
    packed = d.maybe(torch.ops.fusedres_cpu.conv_pack(w, size[2:], stride, padding, dilation))
    residual = d.maybe(d.map((size[0], k, *outputs(size, kernel, stride, padding, dilation)), dtype))
    bias = d.maybe(d.tensor(k, dtype=dtype))
    return d.map(size, dtype), w, packed, bias, residual, stride, padding, dilation, d.one_of(True, False)


def conv_dgrad(d: Draw) -> tuple[Any, ...]:
    size, dtype, k = d.size(), d.one_of(*CONV_FLOATS), d.size()[1]
    kernel, stride, padding, dilation = d.geometry(size)
    dz = d.map((size[0], k, *outputs(size, kernel, stride, padding, dilation)), dtype)
    step = [d.random.randint(1, 3), d.random.randint(1, 3)]
    grid = [-(-side // s) for side, s in zip(size[2:], step, strict=True)]
    residual = d.maybe(d.map((*size[:2], *grid), dtype))
    w = _weight(d, k, size[1], kernel, dtype)
    return dz, w, list(size[2:]), stride, padding, dilation, residual, step


class Chain(NamedTuple):
    """The arguments of ``eval_chain`` beside the activations, and the sizes of what the convs and the pool give."""

    weights: list[Tensor]
    packed: list[Tensor]
    vectors: list[Tensor]
    geometry: list[int]
    identity: bool
    projection: bool
    relu: bool
    pool: list[int]
    convs_out: tuple[int, ...]
    out: tuple[int, ...]


def _chain(d: Draw, size: tuple[int, ...], dtype: torch.dtype) -> Chain:
    count, projection = d.random.randint(1, 3), d.one_of(True, False)
    weights, packed, geometry, at = [], [], [], size
    for _ in range(count):
        kernel, *rest = d.geometry(at)
        weights.append(_weight(d, d.random.randint(1, 40), at[1], kernel, dtype))
        packed.append(torch.ops.fusedres_cpu.conv_pack(weights[-1], at[2:], *rest))
        geometry += [*rest[0], *rest[1], *rest[2]]
        at = (size[0], len(weights[-1]), *outputs(at, kernel, *rest))
    if projection:
        projection = at[2:] == size[2:]
    if projection:
        weights.append(_weight(d, at[1], size[1], [1, 1], dtype))
        packed.append(torch.ops.fusedres_cpu.conv_pack(weights[-1], size[2:], [1, 1], [0, 0], [1, 1]))
        geometry += [1, 1, 0, 0, 1, 1]
    vectors = [
        d.one_of(torch.empty(0, dtype=dtype), d.tensor(len(w), dtype=dtype).abs()) for w in weights for _ in range(5)
    ]
    identity = not projection and at == size and d.one_of(True, False)
    pool = d.one_of([], [], [3, 2, 1])
    out = (*at[:2], *outputs(at, [3, 3], [2, 2], [1, 1], [1, 1])) if pool else at
    return Chain(weights, packed, vectors, geometry, identity, projection, d.one_of(True, False), pool, at, out)


def _eps(convs: int) -> Tensor:
    return torch.full((convs,), 1e-5, dtype=torch.float64)


def eval_chain(d: Draw) -> tuple[Any, ...]:
    size, dtype = d.size(), d.one_of(*CONV_FLOATS)
    chain = _chain(d, size, dtype)
    given = None if chain.identity or chain.projection else d.maybe(d.map(chain.convs_out, dtype))
    packed, eps = d.one_of([], chain.packed), _eps(len(chain.weights))
    form = chain.identity, chain.projection, chain.relu, chain.pool
    return d.map(size, dtype), given, chain.weights, packed, chain.vectors, eps, chain.geometry, *form


def eval_program(d: Draw) -> tuple[Any, ...]:
    size, dtype = d.size(), d.one_of(*CONV_FLOATS)
    chains, at = [], size
    for _ in range(d.random.randint(1, 3)):
        chains.append(_chain(d, at, dtype))
        at = chains[-1].out
    weights, packed, vectors, geometry = (
        list(itertools.chain(*lists)) for lists in list(zip(*chains, strict=True))[:4]
    )
    forms = [(len(c.weights), c.identity, c.projection, c.relu, *(c.pool or (0, 0, 0))) for c in chains]
    eps = _eps(len(weights))
    return weights, d.one_of([], packed), vectors, eps, geometry, list(itertools.chain(*forms)), list(size)


def eval_network(d: Draw) -> tuple[Any, ...]:
    program = eval_program(d)
    return d.map(tuple(program[-1]), program[0][0].dtype), torch.ops.fusedres_cpu.eval_program(*program)


def head_fprop(d: Draw) -> tuple[Any, ...]:
    size, dtype, features = d.size(), d.one_of(*CONV_FLOATS), d.random.randint(1, 70)
    w = d.tensor(features, size[1], dtype=dtype)
    return d.map(size, dtype), w, d.maybe(d.tensor(features, dtype=dtype))


def conv_wgrad(d: Draw) -> tuple[Any, ...]:
    size, dtype, k = d.size(), d.one_of(*FLOATS), d.size()[1]
    kernel, stride, padding, dilation = d.geometry(size)
    out = (size[0], k, *outputs(size, kernel, stride, padding, dilation))
    prologue = d.maybe((d.map(out, dtype), d.rows(4, k, dtype), d.rows(2, k, dtype))) or (None, None, None)
    in_bn = d.maybe(d.rows(4, size[1], dtype))
    return d.map(out, dtype), *prologue, 0.1, d.map(size, dtype), in_bn, kernel, stride, padding, dilation


def centered_wgrad(d: Draw) -> tuple[Any, ...]:
    size, dtype, k = d.size(), d.one_of(*FLOATS), d.size()[1]
    stride = [d.random.randint(1, 3), d.random.randint(1, 3)]
    out = (size[0], k, *outputs(size, [1, 1], stride, [0, 0], [1, 1]))
    in_bn = d.maybe(d.rows(4, size[1], dtype))
    mean = d.tensor(size[1], dtype=acc_dtype(dtype))
    return d.map(out, dtype), d.map(size, dtype), in_bn, mean, stride


def input_moments(d: Draw) -> tuple[Any, ...]:
    size, dtype = d.size(), d.one_of(*FLOATS)
    stride = [d.random.randint(1, 3), d.random.randint(1, 3)]
    return d.map(size, dtype), d.maybe(d.rows(4, size[1], dtype)), stride


def max_abs(d: Draw) -> tuple[Any, ...]:
    return channel_stats(d)


def fingerprint(d: Draw) -> tuple[Any, ...]:
    sizes = [d.size() for _ in range(d.random.randint(1, 3))]
    return ([d.map(size, d.one_of(*FLOATS)) for size in sizes],)


RIGHT: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    function.__name__: function
    for function in (
        *(
            channel_stats,
            bn_finalize,
            scale_shift_add_relu,
            drelu_dbn,
            drelu_dbn_,
            drelu_dbn_by_output_,
            dbn,
            bn_relu_maxpool,
            bn_relu_maxpool_backward,
        ),
        *(conv_pack, conv_fprop, conv_dgrad, conv_wgrad, centered_wgrad, input_moments),
        *(eval_chain, eval_program, eval_network, head_fprop, max_abs, fingerprint),
    )
}


# What can be wrong with a value.


def _resized(d: Draw, t: Tensor) -> Tensor:
    size = list(t.shape) or [1]
    axis = d.random.randrange(len(size))
    size[axis] = d.one_of(0, 1, max(size[axis] - 1, 0), size[axis] + 1, 2 * size[axis])
    made = d.tensor(*size, dtype=torch.float32).to(t.dtype)
    return made.contiguous(memory_format=CL) if len(size) == 4 else made


def _transposed(d: Draw, t: Tensor) -> Tensor:
    return t.transpose(d.random.randrange(t.dim()), d.random.randrange(t.dim())) if t.dim() else t


def _with_gaps(d: Draw, t: Tensor) -> Tensor:
    return torch.cat([t, t], -1)[..., ::2] if t.dim() else t


def _expanded(d: Draw, t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.dim() and len(t) else t


def _many_channels_of_nothing(d: Draw, t: Tensor) -> Tensor:
    return torch.empty(0, d.one_of(2**20, 2**33, 2**40), *t.shape[2:], dtype=t.dtype)


def _off_its_alignment(d: Draw, t: Tensor) -> Tensor:
    room = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:]
    return room.as_strided(t.shape, t.stride(), 1) if t.numel() and t.layout == torch.strided else t


def _without_storage(d: Draw, t: Tensor) -> Tensor:
    t = t.clone(memory_format=torch.preserve_format)
    t.untyped_storage().resize_(d.one_of(0, t.untyped_storage().nbytes() // 2))
    return t


SPOILED_TENSORS: dict[str, Callable[[Draw, Tensor], Any]] = {
    "another size": _resized,
    "another float dtype": lambda d, t: t.to(d.one_of(*FLOATS)),
    "another dtype": lambda d, t: t.to(d.one_of(*OTHER_DTYPES)),
    "transposed": _transposed,
    "contiguous": lambda d, t: t.contiguous(),
    "gaps": _with_gaps,
    "expanded": _expanded,
    "many channels of nothing": _many_channels_of_nothing,
    "off its alignment": _off_its_alignment,
    "without its storage": _without_storage,
    "an axis more": lambda d, t: t[None],
    "an axis less": lambda d, t: t[0] if t.dim() and len(t) else t,
    "on meta": lambda d, t: t.to("meta"),
    "sparse": lambda d, t: t.to_sparse() if t.dtype in FLOATS else t,
    "negative view": lambda d, t: torch._neg_view(t) if t.dtype in FLOATS else t,
    "needs a gradient": lambda d, t: t.detach().requires_grad_() if t.dtype in FLOATS else t,
    "None": lambda d, t: None,
    "a number": lambda d, t: 3,
}


def _spoiled(d: Draw, value: Any) -> tuple[str, Any]:
    """What was done to ``value``, and what became of it."""
    if isinstance(value, Tensor):
        what = d.one_of(*SPOILED_TENSORS)
        return what, SPOILED_TENSORS[what](d, value)
    if isinstance(value, list) and value and isinstance(value[0], Tensor) and d.one_of(True, True, False):
        at = d.random.randrange(len(value))
        what, made = _spoiled(d, value[at])
        return what, [*value[:at], made, *value[at + 1 :]]
    if isinstance(value, list):
        filling = d.one_of(*NUMBERS) if value and isinstance(value[0], int) else torch.zeros(1)
        made = list(value)
        what = d.one_of("shorter", "longer", "other entry", "other entries", "empty")
        if what == "shorter":
            made = made[:-1]
        elif what == "longer":
            made.append(filling)
        elif what == "empty":
            made = []
        elif what == "other entries":
            made = [filling] * len(made)
        elif made:
            made[d.random.randrange(len(made))] = filling
        return f"list {what}", made
    if value is None:
        return "given", d.map(d.size(), d.one_of(*FLOATS))
    if isinstance(value, bool):
        return "the other way", not value
    if isinstance(value, int):
        return "another number", d.one_of(*NUMBERS)
    return "another number", d.one_of(float("nan"), float("inf"), -1.0, 1e308)


#: Five times so many rows and columns of float32 are 2**64 bytes and 31 MiB.
BEYOND_MEMORY = [1073725502, 859006517]


def _beyond_memory(d: Draw) -> Call:
    """The gradient of an input whose size in bytes no 64-bit number holds."""
    (n, c), dtype, far = d.one_of((1, 5), (5, 1)), d.one_of(*CONV_FLOATS), BEYOND_MEMORY
    args = d.map((n, 3, 1, 1), dtype), d.tensor(3, c, 1, 1, dtype=dtype), far, far, [0, 0], [1, 1], None, [1, 1]
    return Call("conv_dgrad", args, ("2: beyond memory",), "no memory holds a tensor")


def _rows_less(d: Draw) -> Call:
    """The affine backward with fewer vectors than it has."""
    g, z, bn, sums, inv_count = dbn(d)
    return Call("dbn", (g, z, bn[: d.random.randrange(4)], sums, inv_count), ("2: rows less",))


def calls(seed: int) -> Iterator[Call]:
    """An endless run of calls, a third of them right."""
    d = Draw(seed)
    for count in itertools.count():
        if count % 100 == 0:
            yield from (_beyond_memory(d), _rows_less(d))
        op = d.one_of(*RIGHT)
        args, spoiled = list(RIGHT[op](d)), []
        for at in d.random.sample(range(len(args)), min(len(args), d.one_of(0, 0, 1, 1, 1, 2))):
            what, made = _spoiled(d, args[at])
            if what == "negative view" and _is_written(op, at):
                continue  # torch writes such views back itself, and fails where an op returns something else
            args[at] = made
            spoiled.append(f"{at}: {what}")
        yield Call(op, tuple(args), tuple(spoiled))


def _is_written(op: str, at: int) -> bool:
    return getattr(torch.ops.fusedres_cpu, op).default._schema.arguments[at].is_write
