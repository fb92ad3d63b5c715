"""Two benchmarks of one machine held against each other: a ratio to fused must not fall by more than its spread."""

from __future__ import annotations

from pathlib import Path

from fusedres.cli import console, results
from fusedres.cli.common import UserError
from fusedres.cli.results import Ratio, Result

EXIT_FELL = 1
#: Of fewer rounds the quartiles say nothing.
ROUNDS = 4

Key = tuple[str, ...]  # network, size, mode, batch, contestant


def run(old_path: Path, new_path: Path) -> int:
    """Print every ratio of both. Returns the exit code: 1 where one fell."""
    old, new = results.read(old_path), results.read(new_path)
    _check_comparable(old, new)
    before, after = _ratios(old), _ratios(new)
    both = [key for key in before if key in after]
    if not both:
        raise UserError("the two files have no measurement in common")
    fallen = [key for key in both if before[key].fell_to(after[key])]
    rows = [
        (
            *key,
            *(f"{ratio.value:.2f}x ± {ratio.spread:.2f}" for ratio in (before[key], after[key])),
            "FELL" if key in fallen else "",
        )
        for key in both
    ]
    columns = ("network", "size", "", "batch", "contestant", "old times fused's", "new times fused's", "")
    console.table(f"{old_path} ({old['commit']}) -> {new_path} ({new['commit']})", columns, rows)
    missing = [key for key in before if key not in after]
    if missing:
        print(f"not measured again: {'; '.join(' '.join(key) for key in missing)}")
    print(f"{len(fallen)} of {len(both)} ratios fell by more than the spread of their rounds")
    return EXIT_FELL if fallen else 0


def _check_comparable(old: Result, new: Result) -> None:
    """UserError where a difference would be of the machine, not of the code."""
    for where, name in (
        ("machine", "cpu"),
        ("machine", "threads"),
        ("machine", "isa"),
        ("machine", "gpus"),
        ("settings", "dtype"),
        ("settings", "device"),
        ("settings", "memory"),
    ):
        if old[where][name] != new[where][name]:
            raise UserError(f"the {name} differs: {old[where][name]} and {new[where][name]}")
    if min(old["settings"]["rounds"], new["settings"]["rounds"]) < ROUNDS:
        raise UserError(f"fewer than {ROUNDS} rounds have no spread to tell a fall by")


def _ratios(result: Result) -> dict[Key, Ratio]:
    return {
        (network["arch"], str(network["image_size"]), timing["mode"], str(timing["batch"]), name): Ratio(
            ratio, timing["spread"][name]
        )
        for network in result["networks"]
        for timing in network["timings"]
        for name, ratio in timing["ratio_to"].items()
    }
