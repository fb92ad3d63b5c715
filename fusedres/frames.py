"""What the functions that run while a forward is traced read, and do, beside calling modules on tensors."""

from __future__ import annotations

import dis
import gc
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn

#: Packages whose functions do nothing but what a graph shows of them.
_KNOWN_PACKAGES = frozenset({"torch", "torchvision", "timm", "math", "operator", "typing", "functools", "warnings"})

#: Functions that a stand-in answers otherwise than a tensor would, or that do more than compute.
_REFUSED_BUILTINS = frozenset(
    {"isinstance", "issubclass", "type", "hasattr", "callable", "id", "hash", "repr", "next"}
    | {"vars", "globals", "locals", "setattr", "delattr", "exec", "eval", "__import__"}
    | {"print", "open", "input", "breakpoint"}
)

#: Functions of PyTorch whose answer follows from neither the module nor its input.
_REFUSED_ATTRIBUTES = frozenset(
    {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_default_dtype"}
    | {"initial_seed", "manual_seed"}
)

#: What a C function may be a method of: it then reads or changes nothing that goes unseen.
_SEEN_OWNERS = (types.ModuleType, type, str, bytes, int, float, tuple, list, dict, set, frozenset, fx.Proxy)

CONSTANTS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = os.path.dirname(os.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_CONTEXTS = tuple(_TORCH + os.path.join(*path.split()) for path in ("utils _contextlib.py", "utils checkpoint.py"))


class Constant(NamedTuple):
    """A name of a module of Python or of a class that a forward read, and its value then."""

    of: Mapping[str, Any]
    name: str
    value: object

    def holds(self) -> bool:
        return self.of.get(self.name, self) is self.value


class Frames:
    """Looks at every function of Python that runs, PyTorch's own apart: what does it read, and has it side effects?"""

    def __init__(self) -> None:
        self.refusal: str | None = None
        self.constants: list[Constant] = []
        self._seen: set[types.CodeType] = set()
        self._attributes = {"forward"}

    @contextmanager
    def watched(self) -> Iterator[None]:
        former, collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # what runs when garbage is collected is none of the forward's
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(former)
            if collects:
                gc.enable()

    def _on_event(self, frame: types.FrameType, event: str, arg: object) -> None:
        file, code = frame.f_code.co_filename, frame.f_code
        if event == "c_call" and code in self._seen:
            owner = getattr(arg, "__self__", None)
            if owner is not None and not isinstance(owner, _SEEN_OWNERS):
                self._refuse(f"{code.co_name} calls a method of a {type(owner).__name__}")
        elif event != "call":
            return
        elif file.startswith(_CONTEXTS):
            self._refuse("its forward enters a context of PyTorch's, or checkpoints")
        elif code not in self._seen and not _is_trusted(file):
            self._seen.add(code)
            self._look_at(code, frame)

    def _refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason

    def _look_at(self, code: types.CodeType, frame: types.FrameType) -> None:
        for instruction in dis.get_instructions(code):
            name, argument = instruction.opname, instruction.argval
            if "_WITH" in name or name == "LOAD_SPECIAL":
                self._refuse(f"{code.co_name} enters a context")
            elif name in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"):
                self._refuse(f"{code.co_name} sets {argument!r}")
            elif name == "IMPORT_NAME" and not _is_known_package(argument):
                self._refuse(f"{code.co_name} imports {argument}")
            elif argument in _REFUSED_ATTRIBUTES:
                self._refuse(f"{code.co_name} asks for {argument}")
            elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                self._attributes.add(argument)
            elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._look_up(code.co_name, argument, frame)
        for name in code.co_freevars:
            value = frame.f_locals.get(name)
            if not (isinstance(value, (fx.Proxy, nn.Module, *CONSTANTS)) or _is_known(value)):
                self._refuse(f"{code.co_name} reads {name!r} of the function around it")

    def _look_up(self, function: str, name: str, frame: types.FrameType) -> None:
        if name in frame.f_globals:
            value = frame.f_globals[name]
            if isinstance(value, CONSTANTS):
                self.constants.append(Constant(frame.f_globals, name, value))
            elif not _is_known(value):
                self._refuse(f"{function} reads the global {name!r}")
        elif name in _REFUSED_BUILTINS:
            self._refuse(f"{function} calls {name}")

    def look_at_classes(self, modules: Iterable[nn.Module]) -> None:
        """What was read of ``modules`` that is not theirs but their classes': methods and constants."""
        kinds = {base for module in modules for base in type(module).__mro__ if _is_foreign(base)}
        for kind in kinds:
            for name in self._attributes & vars(kind).keys():
                value = vars(kind)[name]
                if isinstance(value, (types.FunctionType, *CONSTANTS)):
                    self.constants.append(Constant(vars(kind), name, value))
                elif isinstance(value, (list, dict, set)):
                    self._refuse(f"the class {kind.__name__} keeps {name!r} for all its instances")


def _is_foreign(kind: type) -> bool:
    """Whether ``kind`` is a class of a user's: neither PyTorch's nor made by ``fuse``."""
    return "original" not in vars(kind) and kind is not object and not kind.__module__.startswith("torch.")


def _is_trusted(file: str) -> bool:
    """Whether a function of that file is PyTorch's, Python's or ours: the names in its caller say enough of it."""
    is_python = file.startswith((_STDLIB, "<frozen ")) and "site-packages" not in file
    return is_python or file.startswith((_TORCH, _HERE))


def _is_known(value: object) -> bool:
    """A function of Python (it is looked at where it runs), a class, or a part of a known package."""
    if isinstance(value, (types.FunctionType, type)) or isinstance(getattr(value, "__self__", None), type):
        return True
    module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(module, str) and _is_known_package(module)


def _is_known_package(module: str) -> bool:
    return module.partition(".")[0] in _KNOWN_PACKAGES
