"""The ops of this library in ATen's, for exported programs that are to run where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedres import ops, reference


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What ``torch.export`` decomposes by default, and every functional op of fusedres.

    ``torch.export.export(model.eval(), (x,)).run_decompositions(fusedres.decompositions())`` is a program of ATen's ops
    alone, BN folded into its convs where it was exported under ``torch.no_grad``: for ``torch.export.save``, for
    AOTInductor, for a C++ program. One exported in training mode keeps ``bn_finalize``, which moves statistics.
    """
    ours = {op: getattr(reference, name) for name, op in ops.OPS.items() if not op._schema.is_mutable}
    return {**torch.export.default_decompositions().materialize(), **ours}
