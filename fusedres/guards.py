"""Whether modules are still what they were: a cheap question, asked before every recalled or converted call.

What a plain module computes follows from its class, its attributes and its tensors. All of these lie in its
``__dict__`` and the dictionaries in there, so their identities tell every change but one inside a tensor.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres import native
from fusedres.inspection import has_global_hooks


class _Contents(NamedTuple):
    """The keys and values that a dictionary held, in order."""

    of: dict[str, Any]
    keys: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def read(cls, of: dict[str, Any]) -> _Contents:
        return cls(of, tuple(of), tuple(of.values()))

    def hold(self) -> bool:
        return len(self.of) == len(self.values) and all(map(is_, self.of.values(), self.values))

    def restore(self) -> None:
        self.of.clear()
        self.of.update(zip(self.keys, self.values, strict=True))


class Guard(NamedTuple):
    """What a module was; it keeps the module's attributes, not the module, alive."""

    kind: type[nn.Module]
    state: _Contents
    parts: tuple[_Contents, ...]  # tensors and submodules
    empty: tuple[dict[str, Any], ...]  # hooks, above all

    @classmethod
    def of(cls, module: nn.Module) -> Guard:
        state = module.__dict__
        parts = [part for part in state.values() if isinstance(part, dict)]
        filled = tuple(_Contents.read(part) for part in parts if part)
        return cls(type(module), _Contents.read(state), filled, tuple(part for part in parts if not part))

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` is that module still, of the same class with the same attributes, tensors and hooks."""
        kind, state, parts, empty = self
        return (
            module.__dict__ is state.of
            and type(module) is kind
            and not any(empty)
            and state.hold()
            and all(map(_Contents.hold, parts))
        )


class Identity(NamedTuple):
    """What tells one content of a tensor from another, but for writes past its version counter."""

    address: int
    dtype: torch.dtype
    version: int

    @classmethod
    def of(cls, t: Tensor) -> Identity:
        """Of any tensor; one born in inference mode counts no versions."""
        return cls(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version)

    def holds(self, t: Tensor) -> bool:
        """Whether the content of ``t`` is that one still."""
        return not t.is_inference() and self == Identity.of(t)


def all_hold(guards: tuple[Guard, ...], modules: tuple[nn.Module, ...]) -> bool:
    """Whether ``modules`` are the guarded ones, none changed, and no hook is attached to all modules at once."""
    return not has_global_hooks() and bool(_all("fusedres_guards_hold", Guard.holds)(guards, modules))


def all_unchanged(identities: tuple[Identity, ...], tensors: tuple[Tensor, ...]) -> bool:
    """Whether each of ``tensors`` counts versions, and holds what it held."""
    return bool(_all("fusedres_tensors_hold", Identity.holds)(identities, tensors))


@functools.cache
def _all(name: str, question: Callable[[Any, Any], bool]) -> Callable[[tuple[Any, ...], tuple[Any, ...]], int]:
    """``question(of, thing)`` of every pair: ``name`` of csrc/guards.cpp, or Python where that was not built."""
    function = native.function(name, ctypes.PyDLL)
    if function is None:
        return lambda of, things: len(of) == len(things) and all(map(question, of, things))
    function.argtypes = [ctypes.py_object, ctypes.py_object]
    return function


class Structure(NamedTuple):
    """What a module's forward may decide by: class, attributes, submodules, hooks, and which tensors there are.

    The tensors themselves may be others: their values decide nothing that a graph holds.
    """

    kind: type[nn.Module]
    state: _Contents
    parts: tuple[_Contents, ...]  # submodules, and whatever else the module keeps in dictionaries
    empty: tuple[Any, ...]  # dictionaries, lists and sets with nothing in them: hooks, above all
    collections: tuple[tuple[Any, tuple[Any, ...]], ...]
    tensors: tuple[tuple[dict[str, Any], tuple[type, ...]], ...]

    @classmethod
    def of(cls, module: nn.Module) -> Structure:
        state = module.__dict__
        tensors = tuple(state[name] for name in ("_parameters", "_buffers") if state[name])
        held = [v for v in state.values() if isinstance(v, (dict, list, set)) and not any(v is t for t in tensors)]
        return cls(
            type(module),
            _Contents.read(state),
            tuple(_Contents.read(value) for value in held if value and isinstance(value, dict)),
            tuple(value for value in held if not value),
            tuple((value, tuple(value)) for value in held if value and not isinstance(value, dict)),
            tuple((part, tuple(map(type, part.values()))) for part in tensors),
        )

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` is that module still, built as it was."""
        kind, state, parts, empty, collections, tensors = self
        if module.__dict__ is not state.of or type(module) is not kind or any(empty) or not state.hold():
            return False
        for part in parts:
            if not part.hold():
                return False
        if collections and not self.collections_hold():
            return False
        for tensor_dict, types in tensors:  # noqa: SIM110  # asked at every call: a loop costs a third of a generator
            if tuple(map(type, tensor_dict.values())) != types:
                return False
        return True

    def collections_hold(self) -> bool:
        """Whether lists and sets of the module hold what they held."""
        for collection, then in self.collections:
            if len(collection) != len(then) or not all(map(is_, collection, then)):
                return False
        return True

    def restore(self) -> None:
        """Undo what was put into or taken from the module's attributes and collections since."""
        for contents in (self.state, *self.parts):
            contents.restore()
        for collection in self.empty:
            collection.clear()
        for collection, then in self.collections:
            collection.clear()
            (collection.extend if isinstance(collection, list) else collection.update)(then)


def collections_hold(structures: Iterable[Structure]) -> bool:
    """Whether lists and sets of these modules hold what they held: what of a module its ``Guard`` does not tell."""
    return all(then.collections_hold() for then in structures if then.collections)
