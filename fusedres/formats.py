"""Memory formats: modules that compute in channels_last what they compute in NCHW order, bit patterns of memory apart.

Fused kernels read and write channels_last. Around each of them a contiguous tensor costs two copies; around a module
whose every part is indifferent to the format, two in all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fusedres.chains import Slot
from fusedres.inspection import hook_reason, is_batch_norm
from fusedres.layout import channels_last
from fusedres.nodes import AUGMENTED, is_flatten, is_in_place, module_of

GraphOf = Callable[[nn.Module], fx.Graph | None]

_MODULES = frozenset(
    {nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.Flatten}
    | {nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish}
)
_DROPOUTS = nn.Dropout, nn.Dropout2d  # their masks are drawn in the order of memory
_FUNCTIONS = frozenset(
    {operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, operator.floordiv}
    | {AUGMENTED["iadd"], AUGMENTED["imul"]}
    | {operator.getitem, torch.add, torch.mul, torch.cat, torch.relu, torch.sigmoid, torch.mean, torch.flatten}
    | {F.relu, F.relu_, F.silu, F.gelu, F.hardswish, F.interpolate, F.pad, F.conv2d}
    | {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
)
_METHODS = frozenset({"add", "add_", "mul", "mul_", "mean", "relu", "relu_", "sigmoid", "size", "dim", "flatten"})
_ATTRIBUTES = frozenset({"shape", "dtype", "device"})


def is_contiguous_map(x: Tensor) -> bool:
    """Whether ``x`` is (N, C, H, W) in this order in memory, and not in NHWC order as well."""
    return x.dim() == 4 and x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)


def run_in_channels_last(run: Callable[..., Any], module: nn.Module, args: Sequence[Tensor]) -> Any:
    """``run(module, *args)`` on channels_last copies of contiguous maps; maps among the results are contiguous."""
    y = run(module, *(channels_last(x) if is_contiguous_map(x) else x for x in args))
    return pytree.tree_map(lambda t: t.contiguous() if isinstance(t, Tensor) and t.dim() == 4 else t, y)


def is_indifferent(module: nn.Module, graph_of: GraphOf) -> bool:
    """Whether ``module`` gives the same results for either format of its input, and writes into none of it.

    ``graph_of`` a module is what its forward does, chains fused, or None.
    """
    if is_batch_norm(module) or type(module) in _MODULES:
        return True
    if isinstance(module, _DROPOUTS):
        return not module.training or module.p == 0
    graph = graph_of(module)
    if graph is None or any(hook_reason(child) is not None for child in module.children()):
        return False
    flat: set[fx.Node] = set()  # what is no map any more has no format
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if (inputs and flat.issuperset(inputs)) or is_flatten(node, module):
            flat.add(node)
        elif not _is_indifferent_node(node, module, graph_of):
            return False
        if _writes(node, module) and _origin(node.args[0], module).op == "placeholder":
            return False
    return True


def _is_indifferent_node(node: fx.Node, module: nn.Module, graph_of: GraphOf) -> bool:
    if (called := module_of(node, module)) is not None:
        return is_indifferent(called, graph_of)
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op == "call_function":
        if node.target is getattr:
            return node.args[1] in _ATTRIBUTES
        return node.target in _FUNCTIONS or _is_chain(node)
    return True


def _is_chain(node: fx.Node) -> bool:
    return isinstance(node.target, Slot)


def _writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether ``node`` writes into its first argument; of modules that are indifferent only activations do."""
    if (called := module_of(node, module)) is not None:
        return bool(getattr(called, "inplace", False))
    return not _is_chain(node) and is_in_place(node)


def _origin(node: Any, module: nn.Module) -> fx.Node:
    """Whose memory ``node`` may be in: the module, chain or input that it came from, views and writes passed over."""
    while node.op in ("call_function", "call_method") and not _is_chain(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    called = module_of(node, module)
    if called is not None and (_writes(node, module) or type(called) is nn.Identity):
        return _origin(node.args[0], module)
    return node
