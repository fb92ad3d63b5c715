"""What every host function of the convs needs: checked operands, new tensors, constants, and the launch itself.

Launches go through ``run``, so that ``recording`` can list them instead: with meta tensors a host function then tells
exactly which kernels, arguments and constants it would use, without a GPU and without memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedres import launches, replay
from fusedres.kernels.configs import Tile
from fusedres.kernels.tile import INTERPRETED
from fusedres.problem import ConvProblem

#: Pixel indices are 32 bits wide; element offsets are 64 wherever a tensor needs it.
MAX_PIXELS = 2**31 - 2**12
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up. Triton's own is made for kernels as well, and ten times as slow on the host."""
    return -(-a // b)


class Boxes(NamedTuple):
    """A dense tensor as a kernel sees it through a tensor descriptor, which reads and writes blocks of it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], block: tuple[int, ...]) -> Boxes:
        """A row-major tensor."""
        return cls(shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), block)

    def descriptor(self, base: Tensor) -> TensorDescriptor:
        """As Triton takes it."""
        return TensorDescriptor(base, *map(list, self))


class Launch(NamedTuple):
    """One launch: ``kernel[grid](*args, **constants)``; the constants include num_warps and num_stages.

    ``boxes``: the arguments, by name, that the kernel takes as descriptors.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    boxes: Mapping[str, Boxes]


#: Arguments that become descriptors: their positions among all.
Places = tuple[tuple[int, Boxes], ...]
_NO_BOXES: Mapping[str, Boxes] = {}

_recorded: list[Launch] | None = None

#: Compiled kernels, by everything that Triton would look at to find them. Its own look takes most of a small launch's
#: time.
_compiled: dict[tuple[Any, ...], _Compiled] = {}
_MOST_COMPILED = 1 << 14


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within this context nothing is launched; the list fills with what would have been. Not for several threads."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def run(
    kernel: Any, grid: tuple[int, ...], *args: Any, boxes: Mapping[str, Boxes] = _NO_BOXES, **constants: Any
) -> None:
    """Launch ``kernel``, or note it down within ``recording``. It takes what ``boxes`` names as descriptors."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, boxes))
        return
    recorder = replay.recorder()
    if recorder is None:
        _launch(kernel, grid, args, constants, boxes)
        return
    with recorder.paused():  # the interpreter calls ops of its own
        again = _launch(kernel, grid, args, constants, boxes)
    described = None if INTERPRETED.value else launches.Kernel.of(again.compiled, kernel.arg_names, again.grid)
    tensors = [(i, arg) for i, arg in enumerate(args) if isinstance(arg, Tensor)]
    by_address = not INTERPRETED.value and not boxes  # a descriptor is made of a tensor
    recorder.launch(launches.Launch(again, described, args, by_address), tensors)


class _Compiled:
    """A kernel that Triton has compiled, on a grid: launched without its look for it."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], constexprs: tuple[Any, ...], places: Places) -> None:
        self.compiled, self.grid = compiled, grid + (1,) * (3 - len(grid))
        self._run, self._constexprs, self._places = compiled[self.grid], constexprs, places

    def __call__(self, *args: Any) -> None:
        self._run(*_with_descriptors(args, self._places), *self._constexprs)


def _with_descriptors(args: tuple[Any, ...], places: Places) -> Sequence[Any]:
    """``args`` with descriptors of those at ``places``."""
    if not places:
        return args
    described = list(args)
    for i, boxes in places:
        if args[i] is not None:
            described[i] = boxes.descriptor(args[i])
    return described


def _launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], boxes: Mapping[str, Boxes]
) -> Any:
    """Launch ``kernel``. Returns what does so again."""
    places = tuple((kernel.arg_names.index(name), box) for name, box in boxes.items())
    if INTERPRETED.value:

        def interpreted(*args: Any) -> None:
            kernel[grid](*_with_descriptors(args, places), **constants)

        interpreted(*args)
        return interpreted
    key = (kernel.fn, args[0].get_device(), grid, *map(_specialisation, args), *constants.values(), *places)
    again = _compiled.get(key)
    if again is None:
        compiled = kernel[grid](*_with_descriptors(args, places), **constants)
        if len(_compiled) >= _MOST_COMPILED:  # sizes that never come again
            _compiled.clear()
        constexprs = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        again = _compiled[key] = _Compiled(compiled, grid, constexprs, places)
    else:
        again(*args)
    return again


def _specialisation(arg: Any) -> Any:
    """What of an argument Triton may compile a kernel for: an integer's value, a tensor's dtype and alignment."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    return type(arg) if isinstance(arg, float) else arg


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a dot: TF32 where PyTorch's own convolutions would use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


def is_wide(*operands: Tensor | None) -> bool:
    """Whether an element of these is out of reach of a 32-bit offset."""
    return any(t is not None and t.numel() >= 2**31 for t in operands)


def contiguous(vector: Tensor | None) -> Tensor | None:
    """A per-channel tensor dense, as kernels read it; nothing stays nothing."""
    return None if vector is None else vector.contiguous()


def check_operands(like: Tensor, **expected: tuple[Tensor | None, Sequence[int], torch.dtype]) -> None:
    """RuntimeError unless every given operand has the shape and dtype the op's contract states, on one device."""
    if like.dtype not in _DTYPES:
        raise RuntimeError(f"Triton kernels compute float32, bfloat16 and float16, not {like.dtype}")
    for name, (operand, shape, dtype) in expected.items():
        if operand is None:
            continue
        if operand.shape != torch.Size(shape) or operand.dtype != dtype:
            raise RuntimeError(
                f"{name} must be {dtype} of shape {tuple(shape)}, not {operand.dtype} of {tuple(operand.shape)}"
            )
        if operand.device != like.device:
            raise RuntimeError(f"{name} is on {operand.device}, the activations on {like.device}")


def check_pixels(problem: ConvProblem) -> None:
    """RuntimeError for more pixels than a 32-bit index can count."""
    count = max(problem.gemm_m, problem.N * problem.H * problem.W)
    if count > MAX_PIXELS:
        raise RuntimeError(f"{count} pixels are more than the {MAX_PIXELS} that the kernels can index")


def geometry(problem: ConvProblem) -> dict[str, int]:
    """The constants of a convolution that kernels are compiled for."""
    return {
        "R": problem.R,
        "S": problem.S,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0],
        "PAD_W": problem.padding[1],
        "DIL_H": problem.dilation[0],
        "DIL_W": problem.dilation[1],
    }


def tile_constants(tile: Tile) -> dict[str, int]:
    """The constants and launch options of a tile."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
