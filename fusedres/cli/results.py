"""What ``fusedres bench --json`` writes and others read: rows of samples with their ratios, files, folders.

A ratio is how many times longer a contestant takes than fused: the median over the rounds, in each of which all take
turns, so that a drift of the machine moves both. Its spread is what the middle half of the rounds covers.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fusedres.cli.common import UserError
from fusedres.cli.contest import EAGER, FUSED
from fusedres.measure import medians

SCHEMA = 2  # raised when a reader of the old one would err

Result = dict[str, Any]
Row = dict[str, Any]
Samples = Mapping[str, list[float]]


class Ratio(NamedTuple):
    """A ratio and its spread."""

    value: float
    spread: float

    @classmethod
    def of(cls, samples: Samples, contestant: str) -> Ratio:
        """Of what interleaved rounds took ``contestant`` and fused."""
        rounds = [theirs / ours for theirs, ours in zip(samples[contestant], samples[FUSED], strict=True)]
        if len(rounds) == 1:
            return cls(rounds[0], 0.0)
        low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return cls(middle, high - low)

    def fell_to(self, new: Ratio) -> bool:
        """Whether ``new`` is below this one by more than both spread together."""
        return new.value < self.value - math.hypot(self.spread, new.spread)


def row_of(samples: Samples, batch: int) -> Row:
    """The medians, and the ratios of all others to fused; ``ratio`` is that of the faster eager layout."""
    median = medians(samples)
    ratios = {name: Ratio.of(samples, name) for name in samples if name != FUSED}
    return {
        "ratio": min(ratios[name].value for name in EAGER if name in ratios),
        "ratio_to": {name: ratio.value for name, ratio in ratios.items()},
        "spread": {name: ratio.spread for name, ratio in ratios.items()},
        "median_s": median,
        "images_per_s": {name: batch / seconds for name, seconds in median.items()},
        "samples_s": dict(samples),
    }


def read(path: Path) -> Result:
    """The result in ``path``. UserError where it is missing or something else."""
    from fusedres.cli import tables  # a room above: it draws on this one

    try:
        result = json.loads(path.read_text())
        if result["schema"] not in (1, SCHEMA):
            raise UserError(f"{path} has schema {result['schema']}, this version reads {SCHEMA}")
        result = _of_one_network(result) if result["schema"] == 1 else result
        tables.markdown(result)  # asks for everything that a result must have
        return result
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} was not written by `fusedres bench --json`") from None


def _of_one_network(old: Result) -> Result:
    """A result of schema 1 in today's form."""
    settings = dict(old["settings"])
    network = {key: settings.pop(key) for key in ("arch", "image_size", "eager")}
    network |= {key: old[key] for key in ("proof", "launches", "saved_bytes_per_image")}
    network["timings"] = [{**t, **row_of(t["samples_s"], t["batch"])} for t in old["timings"]]
    kept = {key: old[key] for key in ("date", "commit", "machine", "versions")}
    return {"schema": SCHEMA, **kept, "settings": settings, "networks": [network]}


def machine_name(result: Result) -> str:
    """What was measured, in words."""
    machine = result["machine"]
    if result["settings"]["device"].startswith("cuda"):
        return ", ".join(machine["gpus"])
    return f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads"


def stored_under(folder: Path, result: Result) -> Path:
    """``folder/<machine>/<date>.json``; a file that is there is followed by ``<date>-2.json`` and so on."""
    place = folder / re.sub(r"[^a-z0-9]+", "-", machine_name(result).lower()).strip("-")
    date = datetime.datetime.fromisoformat(result["date"]).date().isoformat()
    names = (f"{date}{suffix}.json" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(path for path in (place / name for name in names) if not path.exists())
