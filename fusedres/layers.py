"""The layer that is not a block: conv, BN and ReLU in one fused unit."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fusedres.functional import ConvBN, chain_reason, residual_chain
from fusedres.inspection import plain_reason
from fusedres.problem import Pair, as_pair
from fusedres.specs import Memory, checked_memory


class FusedConvBNReLU(nn.Module):
    """Conv, BN and ReLU fused; its submodules ``conv``, ``bn``, ``relu`` stay usable alone.

    x: (N, in_channels, H, W) float64 | float32 | bfloat16 | float16 -> (N, out_channels, P, Q).
    ``padding`` None keeps the size of the map at stride 1. ``relu=False`` ends with the BN.
    ``memory="recompute"`` keeps the input alone for backward and runs the conv again there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        stride: int | Pair = 1,
        padding: int | Pair | None = None,
        dilation: int | Pair = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        relu: bool = True,
        norm_layer: Callable[..., nn.Module] | None = None,
        memory: Memory = "standard",
    ) -> None:
        super().__init__()
        kernel, dilation = as_pair(kernel_size), as_pair(dilation)
        if padding is None:
            padding = dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=bias)
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()
        self.memory = checked_memory(memory)

    @property
    def _activations(self) -> list[nn.Module]:
        """What follows the BN and does anything, a hook on it included."""
        return [] if plain_reason(self.relu, nn.Identity) is None else [self.relu]

    @property
    def pairs(self) -> list[ConvBN]:
        """The one conv of this layer and its BN."""
        return [ConvBN(self.conv, self.bn)]

    def reason(self) -> str | None:
        """Why this layer runs its modules one by one instead of fused, or None."""
        return chain_reason(self.pairs, self._activations)

    def forward(self, x: Tensor) -> Tensor:
        return residual_chain(
            x, self.pairs, None, len(self._activations) > 0, self.memory, self._unfused, self._activations
        )

    def _unfused(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))
