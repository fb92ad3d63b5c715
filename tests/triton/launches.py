"""Which Triton kernels a function launches, by name: compiled or interpreted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from fusedres.kernels import launch

#: Launches on per-channel vectors: finalize, and the second step of each reduction. They touch no activation.
SMALL = {"bn_finalize_kernel", "merge_statistics_kernel", "merge_sums_kernel", "sum_kernel", "bn_constants_kernel"}


class _Forgetful(dict):  # type: ignore[type-arg]
    """Finds nothing, so that every launch goes through Triton's own ``run``."""

    def get(self, *_: object) -> None:
        return None


def launched(function: Callable[[], object]) -> Counter[str]:
    """How often ``function()`` launches each kernel."""
    names: Counter[str] = Counter()

    def counting(real: Callable[..., Any], name_of: Callable[[Any], str]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            names[name_of(self)] += 1
            return real(self, *args, **kwargs)

        return call

    with (
        mock.patch.object(launch, "_compiled", _Forgetful()),
        mock.patch.object(GridExecutor, "__call__", counting(GridExecutor.__call__, lambda g: g.fn.__name__)),
        mock.patch.object(JITFunction, "run", counting(JITFunction.run, lambda k: k.fn.__name__)),
    ):
        function()
    return names


def on_activations(names: Counter[str]) -> Counter[str]:
    """Those of ``names`` that read or write an activation or a weight."""
    return Counter({name: count for name, count in names.items() if name not in SMALL})
