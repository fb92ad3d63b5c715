"""A benchmark's result made up from seconds, for tests of what is done with results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedres.cli import results
from fusedres.cli.contest import CHANNELS_LAST, FUSED, NCHW

ROUNDS = 8
PLAN = {"launches": 10, "bytes": 40_000_000, "activation_bytes": 30_000_000, "flops": 8_000_000_000}


def rounds(seconds: float, jitter: float = 0.0) -> list[float]:
    """Samples around ``seconds``, alternately longer and shorter by the share ``jitter``."""
    return [seconds * (1 + jitter * (-1) ** i) for i in range(ROUNDS)]


def samples(jitter: float = 0.0, **seconds: float) -> dict[str, list[float]]:
    """Of eager in both layouts, fused and others; fused is steady."""
    names = {"nchw": NCHW, "channels_last": CHANNELS_LAST, "fused": FUSED}
    return {names.get(k, k): rounds(s, 0 if k == "fused" else jitter) for k, s in seconds.items()}


def timing(mode: str, batch: int, taken: Mapping[str, list[float]]) -> dict[str, Any]:
    plans = {plan: PLAN | {"seconds": 0.01, "memory_s": 0.005} for plan in ("eager", "conv", "block")}
    return {"mode": mode, "batch": batch, **results.row_of(taken, batch), "plans": plans}


def block(name: str, mode: str, eager: float, fused: float) -> dict[str, Any]:
    taken = samples(channels_last=eager, fused=fused)
    plans = {who: PLAN | {"seconds": fused / 2, "memory_s": 0.0} for who in (CHANNELS_LAST, FUSED)}
    row = {"block": name, "count": 2, "input": [8, 64, 56, 56], "mode": mode, **results.row_of(taken, 8)}
    return row | {"plans": plans}


def point(axis: str, mode: str, value: int, eager: float, fused: float) -> dict[str, Any]:
    row = {"axis": axis, "mode": mode, "value": value, "arch": "resnet18", "batch": value, "image_size": 224}
    row |= results.row_of(samples(channels_last=eager, fused=fused), value)
    return row | ({"saved_bytes": {CHANNELS_LAST: 2e6 * value, FUSED: 1e6 * value}} if mode == "train" else {})


def result(*timings: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A result of ResNet-50 with ``timings``; ``others`` replace or add keys."""
    network = {
        "arch": "resnet50",
        "image_size": 224,
        "eager": "torchvision",
        "proof": [],
        "timings": list(timings),
        "blocks": [block(f"layer{i}.0", mode, 0.02 * i, 0.01 * i) for mode in ("eval", "train") for i in (1, 2)],
        "left_out": [{"peer": "OpenVINO", "mode": "train", "why": "it does not train"}],
        "launches": [],
        "saved_bytes_per_image": {"eager": 85e6, "standard": 42e6, "recompute": 32e6},
    }
    made = {
        "schema": results.SCHEMA,
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789ab",
        "machine": {"cpu": "abacus", "threads": 2, "cores": 2, "isa": "BEADS", "gpus": [], "system": "wood"},
        "versions": {"torch": "2.14.1", "triton": None},
        "load": {"before": [0.5, 0.5, 0.5], "after": [2.0, 1.0, 0.5]},
        "settings": {
            "dtype": "float32",
            "device": "cpu",
            "memory": "standard",
            "rounds": ROUNDS,
            "training_step": "all of it",
        },
        "roof": {"bytes_per_s": 2e10, "flops_per_s": 2e11, "source": "made up"},
        "networks": [network],
        "scaling": [point("batch", mode, n, 0.02 * n, 0.01 * n) for mode in ("eval", "train") for n in (1, 2, 4, 8)],
    }
    return made | others
