"""The ``reference`` engine as an entry of the dispatch table: the functions of ``fusedres.reference``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedres import reference
from fusedres.engines import Engine


class ReferenceEngine(Engine):
    name = "reference"
    fuses_prologue = True
    statistics_apart = True

    def rejects(self, op: str, device_type: str, dtype: torch.dtype) -> str | None:
        return None

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return getattr(reference, op)


REFERENCE = ReferenceEngine()
