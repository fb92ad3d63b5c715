"""Which kernel of csrc/cuda serves a folded chain, or a head, in one launch; why none does; what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.engines import EvalChain, FoldedConv
from fusedres.layout import channels_last
from fusedres.problem import Pair, as_pair

#: Of the convs of a chain: (the kernel that serves it, the conv that may have a stride).
_FORMS = {
    ((1, 1), (3, 3), (1, 1)): ("bottleneck_fprop", 1),
    ((3, 3), (3, 3)): ("basic_block_fprop", 0),
    ((7, 7),): ("stem_fprop", 0),
    ((3, 3),): ("stem_fprop", 0),
}
#: Kernels read 16 bytes at a time: eight channels.
_CHANNEL_MULTIPLE = 8
#: Widest 3x3 convs of a block worth one launch. Beyond it arithmetic bounds the block and not the traffic between its
#: convs, and a halo adds to the arithmetic (docs/gpu.md).
MAX_WIDTH = {"bottleneck_fprop": 256, "basic_block_fprop": 128}
#: The channels and the columns that a stem's weight is padded to: a filter row and one tap of zeros.
_STEM_CHANNELS, _STEM_ADDED = 4, 1


class Stem(NamedTuple):
    """A stem that the kernel has, by the size of its filter: the conv's stride, and the max-pool behind its ReLU."""

    stride: int
    pool: tuple[int, int, int] | None
    text: str


_STEMS = {
    7: Stem(2, (3, 2, 1), "a 7x7 conv of stride 2, a ReLU and a 3x3 max-pool of stride 2"),
    3: Stem(1, None, "a 3x3 conv of stride 1 and a ReLU"),
}

Chain = EvalChain[FoldedConv]
Arguments = tuple[Tensor | int | None, ...]


def kernel_of(chain: Chain) -> str | None:
    """The kernel for convs of these sizes, or None."""
    form = _FORMS.get(_sizes(chain))
    return form[0] if form else None


def _sizes(chain: Chain) -> tuple[Pair, ...]:
    return tuple(as_pair(conv.w.shape[2:]) for conv in chain.convs)


def form_reason(chain: Chain) -> str | None:
    """Why no kernel computes ``chain`` whatever its channels, or None."""
    if _sizes(chain) not in _FORMS:
        return "no kernel has its sequence of convs"
    kernel, strided = _FORMS[_sizes(chain)]
    convs = chain.all_convs
    if any(conv.groups != 1 for conv in convs):
        return "no kernel has groups"
    if not all(map(_keeps_its_map, convs)):
        return "no kernel has such padding or dilation"
    stride = chain.convs[strided].stride
    if stride not in ((1, 1), (2, 2)) or any(c.stride != (1, 1) for i, c in enumerate(chain.convs) if i != strided):
        return "no kernel has such strides"
    return _stem_reason(chain) if kernel == "stem_fprop" else _block_reason(chain, stride)


def _keeps_its_map(conv: FoldedConv) -> bool:
    """Whether the conv is padded so that at stride 1 its map keeps its size, and not dilated."""
    size = conv.w.shape[2:]
    return conv.padding == tuple(k // 2 for k in size) and (conv.dilation == (1, 1) or size == (1, 1))


def _block_reason(chain: Chain, stride: tuple[int, int]) -> str | None:
    if not chain.relu or chain.pool is not None:
        return "a block kernel ends in a ReLU"
    if chain.projection is not None:
        is_projection = tuple(chain.projection.w.shape[2:]) == (1, 1) and chain.projection.stride == stride
        return None if is_projection else "no kernel has such a projection"
    return None if chain.identity else "its shortcut is neither its input nor a projection of that"


def _stem_reason(chain: Chain) -> str | None:
    (conv,) = chain.convs
    channels, size = conv.w.shape[1], conv.w.shape[2]
    stem = _STEMS[size]
    if channels > _STEM_CHANNELS:
        return f"the stem's kernel takes {_STEM_CHANNELS} channels, not {channels}"
    is_stem = conv.stride == (stem.stride, stem.stride) and chain.pool == stem.pool and chain.relu
    if not is_stem or chain.identity or chain.given or chain.projection is not None:
        return f"the stem's {size}x{size} kernel is {stem.text}"
    return None


def is_measured(chain: Chain) -> bool:
    """Whether the kernel of ``chain`` was measured on a GPU to be faster than a launch a conv (docs/gpu.md)."""
    return _sizes(chain) == ((7, 7),)


def size_reason(chain: Chain, shared_memory: int, shared_bytes: Callable[[str, int, int], int]) -> str | None:
    """Why the channels of ``chain``, whose form a kernel has, are none for it; or None.

    ``shared_memory``: bytes that a thread block may have. ``shared_bytes(kernel, width, stride)``: those it needs.
    """
    kernel, strided = _FORMS[_sizes(chain)]
    channels = [conv.w.shape[0] for conv in chain.convs]
    if kernel != "stem_fprop":
        channels.append(chain.convs[0].w.shape[1])
    odd = [c for c in channels if c % _CHANNEL_MULTIPLE]
    if odd:
        return f"{kernel} takes channels in multiples of {_CHANNEL_MULTIPLE}, not {odd[0]}"
    if kernel not in MAX_WIDTH:
        return None
    width, stride = chain.convs[strided].w.shape[0], chain.convs[strided].stride[0]
    if width > MAX_WIDTH[kernel]:
        return (
            f"{kernel} is for widths to {MAX_WIDTH[kernel]}, not {width}: there arithmetic bounds a block, not traffic"
        )
    needed = shared_bytes(kernel, width, stride)
    if needed > shared_memory:
        return f"{kernel} of width {width} and stride {stride} needs {needed} bytes of shared memory of {shared_memory}"
    return None


def head_reason(w: Tensor) -> str | None:
    """Why the head's kernel does not take the weight ``w`` (F, C) of a fully connected layer, or None."""
    if w.shape[0] == 0 or w.shape[1] % _CHANNEL_MULTIPLE or not w.is_contiguous():
        return f"head_fprop takes dense weights, channels in multiples of {_CHANNEL_MULTIPLE}, not {tuple(w.shape)}"
    return None


def arguments(chain: Chain) -> Arguments:
    """What the kernel of ``chain`` is called with behind ``x``: weights channels_last, biases in float32."""
    kernel, strided = _FORMS[_sizes(chain)]
    if kernel == "stem_fprop":
        (conv,) = chain.convs
        return stem_weight(conv.w), _bias(conv)
    biases = [_bias(conv) for conv in chain.convs]
    w_shortcut = None
    if chain.projection is not None:
        w_shortcut = channels_last(chain.projection.w)
        biases[-1] = biases[-1] + _bias(chain.projection)
    convs = [t for conv, bias in zip(chain.convs, biases, strict=True) for t in (channels_last(conv.w), bias)]
    return *convs, w_shortcut, chain.convs[strided].stride[0]


def _bias(conv: FoldedConv) -> Tensor:
    if conv.bias is None:
        return conv.w.new_zeros(conv.w.shape[0], dtype=torch.float32)
    return conv.bias.float().contiguous()


def stem_weight(w: Tensor) -> Tensor:
    """(K, C, R, R) -> (K, 4, R, R + 1) channels_last, zeros in the channels and the column added."""
    k, c, r, s = w.shape
    padded = w.new_zeros((k, r, s + _STEM_ADDED, _STEM_CHANNELS)).permute(0, 3, 1, 2)
    padded[:, :c, :, :s] = w
    return padded
