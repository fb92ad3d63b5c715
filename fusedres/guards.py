"""Whether modules are still what they were: a cheap question, asked before every recalled call.

What a plain module computes follows from its class, its attributes and its tensors. All of these lie in its
``__dict__`` and the dictionaries in there, so their identities tell every change but one inside a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import nn

from fusedres.inspection import has_global_hooks


class _Contents(NamedTuple):
    """The values that a dictionary held, in order."""

    of: dict[str, Any]
    values: tuple[Any, ...]

    @classmethod
    def read(cls, of: dict[str, Any]) -> _Contents:
        return cls(of, tuple(of.values()))

    def hold(self) -> bool:
        return len(self.of) == len(self.values) and all(map(is_, self.of.values(), self.values))


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


def all_hold(guards: Sequence[Guard], modules: Sequence[nn.Module]) -> bool:
    """Whether ``modules`` are the guarded ones, none changed, and no hook is attached to all modules at once."""
    return len(guards) == len(modules) and not has_global_hooks() and all(map(Guard.holds, guards, modules))
