"""What one node of a graph calls, and whether that may write into its arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedres.inspection import batch_norm_reason, plain_reason


def _as_function(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def in_place(a: Any, b: Any) -> Any:
        return function(a, b)

    in_place.__name__ = in_place.__qualname__ = name
    return in_place


#: ``a += b`` and the like as functions of this package: fx writes those of ``operator`` out as statements, which would
#: change a number for everyone who reads it.
AUGMENTED = {
    name: _as_function(name)
    for name in (
        *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
}

_ADDS = (operator.add, operator.iadd, AUGMENTED["iadd"], torch.add)
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


def called(node: fx.Node) -> str:
    """The name of the function or method."""
    return str(getattr(node.target, "__name__", node.target))


def module_of(node: fx.Node, owner: nn.Module) -> nn.Module | None:
    """The module of ``owner`` that it calls, if it calls one."""
    return owner.get_submodule(str(node.target)) if node.op == "call_module" else None


def takes_one(node: fx.Node) -> bool:
    """Whether it is called with one tensor and nothing else."""
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def is_add(node: fx.Node) -> bool:
    """Whether it adds two values, unscaled."""
    is_call = node.op == "call_function" and node.target in _ADDS
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    return (is_call or is_method) and len(node.args) == 2 and not node.kwargs


def is_relu_call(node: fx.Node) -> bool:
    """Whether it is ReLU, as a function or a method."""
    is_call = node.op == "call_function" and node.target in _RELUS
    is_method = node.op == "call_method" and node.target in ("relu", "relu_")
    return (is_call or is_method) and set(node.kwargs) <= {"inplace"}


def is_relu_module(module: nn.Module, node: fx.Node) -> bool:
    """Whether it calls ``module``, a plain ReLU."""
    return plain_reason(module, nn.ReLU) is None and takes_one(node)


def is_flatten(node: fx.Node, owner: nn.Module) -> bool:
    """Whether it makes (N, features) of a map, as a function, a method or a module of ``owner``."""
    flatten = module_of(node, owner)
    if flatten is not None:
        return type(flatten) is nn.Flatten and (flatten.start_dim, flatten.end_dim) == (1, -1)
    return (node.target is torch.flatten or node.target == "flatten") and node.args[1:] == (1,) and not node.kwargs


def is_in_place(node: fx.Node) -> bool:
    """Whether the function or method may write into its first argument. Unknown ones may."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    name = called(node)
    is_operator = getattr(node.target, "__module__", None) == "_operator"
    is_known = is_operator or name == "getattr" or node.target in (getattr(torch, name, None), getattr(F, name, None))
    by_name = name.endswith("_") or (is_operator and name.startswith(("i", "set", "del")))
    by_argument = "out" in node.kwargs or any(argument is True for argument in (*node.args, node.kwargs.get("inplace")))
    return by_name or by_argument or not is_known


def is_pure(module: nn.Module) -> bool:
    """Whether calling ``module`` is known to write into nothing that it is given."""
    children = list(module.children())
    if children:
        return plain_reason(module, nn.Sequential) is None and all(map(is_pure, children))
    is_known = type(module).__module__.startswith("torch.nn.") or batch_norm_reason(module) is None
    return is_known and not getattr(module, "inplace", False) and plain_reason(module, type(module)) is None
