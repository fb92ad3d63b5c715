"""Launches of compiled kernels described in words, a list of them made by one native call (csrc/launch.cpp).

Triton's launcher is Python, once a launch; on the host that is most of what a small launch costs.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import native

#: kMostParams in csrc/launch.cpp.
MOST_PARAMS = 64
_NO_ROOT = -1
_WARP = 32
_FORMATS = {"i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"} | {
    "fp32": "<f",
    "fp64": "<d",
}


class Kernel(NamedTuple):
    """A compiled kernel on a grid, as the driver launches it."""

    function: int  # CUfunction
    grid: tuple[int, ...]
    threads: int  # of a block
    shared_bytes: int
    params: tuple[tuple[int, str], ...]  # of each parameter: which argument it is, and its type in Triton's words

    @classmethod
    def of(cls, compiled: Any, names: Sequence[str], grid: tuple[int, int, int]) -> Kernel | None:
        """Triton's ``compiled`` with arguments ``names``, where nothing is asked of a launch that the words lack."""
        metadata = compiled.metadata
        options = metadata.launch_cooperative_grid, metadata.launch_pdl, metadata.num_ctas != 1
        if any(options) or metadata.global_scratch_size or metadata.profile_scratch_size:
            return None
        types = [compiled.src.signature[name] for name in names]
        params = tuple((i, kind) for i, kind in enumerate(types) if kind != "constexpr")
        if len(params) > MOST_PARAMS - 2 or any(kind[0] != "*" and kind not in _FORMATS for _, kind in params):
            return None
        return cls(compiled.function, grid, _WARP * metadata.num_warps, metadata.shared, params)


class Place(NamedTuple):
    """Where an argument of a launch lies: which argument it is, and what it is of its root."""

    argument: int
    offset: int  # bytes
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    def of(self, root: Tensor) -> Tensor:
        """The argument as a tensor."""
        empty = torch.empty(0, dtype=self.dtype, device=root.device)
        start = (root.storage_offset() * root.itemsize + self.offset) // empty.itemsize
        return empty.set_(root.untyped_storage(), start, self.size, self.stride)


class Launch:
    """``function(*args)``, which launched ``kernel``: None for one that is interpreted or needs Triton's launcher.

    Its tensors are parts of roots, ``places`` tells which. ``by_address``: ``function`` takes addresses for them, too.
    """

    def __init__(
        self, function: Callable[..., None], kernel: Kernel | None, args: Sequence[Any], by_address: bool
    ) -> None:
        self.function, self.kernel, self.by_address = function, kernel, by_address
        self.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        self.places: list[Place] = []

    @property
    def is_native(self) -> bool:
        """Whether the native library can make it."""
        return self.kernel is not None and native_launch() is not None and driver_launch() is not None

    def bound(self) -> Callable[..., None]:
        """The launch as a function of the roots of its tensors."""
        function, others, places, by_address = self.function, self.others, tuple(self.places), self.by_address

        def launch(*roots: Tensor) -> None:
            args = others.copy()
            for place, root in zip(places, roots, strict=True):
                args[place.argument] = root.data_ptr() + place.offset if by_address else place.of(root)
            function(*args)

        return launch

    def words(self, roots: Sequence[int]) -> list[int]:
        """As csrc/launch.cpp reads it; ``roots``: for each place, which of the list's roots it is part of."""
        kernel = self.kernel
        assert kernel is not None
        tensors = {place.argument: (root, place.offset) for place, root in zip(self.places, roots, strict=True)}
        params = [tensors.get(i) or (_NO_ROOT, _bits(self.others[i], kind)) for i, kind in kernel.params]
        params += [(_NO_ROOT, 0)] * 2  # Triton's scratch memories, which these kernels do not use
        header = [kernel.function, *kernel.grid, kernel.threads, kernel.shared_bytes, len(params)]
        return header + [word for param in params for word in param]


def bound(launches: Sequence[Launch], roots: Sequence[Sequence[int]], count: int, device: int) -> Callable[..., None]:
    """``launches``, all of compiled kernels, one after another on the current stream, as a function of ``count`` roots.

    ``roots``: for each launch, which of them each of its places is part of.
    """
    words = array("q", [word for launch, of in zip(launches, roots, strict=True) for word in launch.words(of)])
    address, length = words.buffer_info()[0], len(launches)
    addresses = ctypes.c_uint64 * count
    launch_all, driver, current_stream = native_launch(), driver_launch(), torch._C._cuda_getCurrentRawStream

    def launch(*tensors: Tensor, words: array[int] = words) -> None:  # the words live as long as this does
        pointers = addresses(*[t.data_ptr() for t in tensors])
        error = launch_all(driver, address, length, pointers, current_stream(device))
        if error:
            raise RuntimeError(f"cuLaunchKernel returned the CUDA driver's error {error}")

    return launch


@functools.cache
def native_launch() -> Any:
    """``fusedres_launch`` of csrc/launch.cpp, or None where it was not built."""
    function = native.function("fusedres_launch")
    if function is not None:
        function.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64]
    return function


@functools.cache
def driver_launch() -> int | None:
    """The address of ``cuLaunchKernel``, or None without a driver."""
    try:
        return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _bits(value: Any, kind: str) -> int:
    """``value`` as a parameter of a type in Triton's words, in the low bytes of a signed 64-bit word."""
    return int.from_bytes(struct.pack(_FORMATS[kind], value).ljust(8, b"\0"), "little", signed=True)
