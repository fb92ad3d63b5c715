"""docs/reliability.md from the results of the long runs: every figure in it is read from them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"

Result = dict[str, Any]
Section = tuple[str, str, tuple[str, ...], list[tuple[Any, ...]]]  # title, text, columns and rows of its table

HEAD = """\
What was tried to break the package, and what came of it. `make soak` wrote this from tests/soak/results.json: no figure
is typed. `make test` runs a short form of all of it but the sanitizers and the planted faults.
"""


def write(results: dict[str, Result]) -> None:
    """Write the document: a section for each part that has results."""
    sections = [_text(section(results[name]), results[name]) for name, section in SECTIONS.items() if name in results]
    DOCUMENT.write_text("\n".join(["# Reliability\n", HEAD, *sections]))


def _text(section: Section, part: Result) -> str:
    title, text, columns, rows = section
    commit = f", commit {part['commit']}" if part["commit"] else ""
    origin = f"({part['date']}: {part['seconds']} s on {part['cpu']}, torch {part['torch']}{commit})"
    table = [f"| {' | '.join(map(str, row))} |" for row in (columns, ("---",) * len(columns), *rows)] if rows else []
    filled = textwrap.fill(f"{text} {origin}", 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"## {title}\n", filled, *(["", *table] if table else []), ""])


def _tests(part: Result) -> str:
    skipped = f"{part['skipped']} skipped here ({'; '.join(part['reasons'])})" if part["skipped"] else "none skipped"
    return f"{part['tests']} tests, {skipped}."


def _cases(part: Result) -> Section:
    text = (
        "Problems that users of such software really hit, each standing for a kind of fault, and how many tests settle"
        f" it: {len(part['cases'])} cases, {_tests(part)}"
    )
    return "Field cases", text, ("case", "tests"), list(part["cases"].items())


def _properties(part: Result) -> Section:
    text = (
        "Any geometry, dtype, memory format, mode of each BN, frozen part, hook, NaN or infinity, drawn by hypothesis"
        f" and held against eager: {sum(part['examples'].values())} examples."
    )
    names = {"block": "blocks, layers and stems", "fuse": "forwards of random calls through `fuse`"}
    rows = [(names[name], examples) for name, examples in part["examples"].items()]
    return "Random problems", text, ("drawn", "examples"), rows


def _fuzz(part: Result) -> Section:
    runs = part["runs"]
    text = (
        "Every op of the native library under AddressSanitizer and UndefinedBehaviorSanitizer, with right and with"
        f" spoiled arguments: {sum(run['calls'] for run in runs)} calls of {runs[0]['ops']} ops, none of which read or"
        " wrote beyond its memory; that would have ended the run."
    )
    columns = ("isa", "seed", "calls", "answered", "refused")
    return "Native entry points", text, columns, [tuple(run[column] for column in columns) for run in runs]


def _memory(part: Result) -> Section:
    text = (
        "Resident memory and the tensors alive, at the end against a fifth of the rounds: one tensor or 4 MiB more"
        " would be a fault."
    )
    rows = [(grown["what"], grown["rounds"], grown["tensors"], grown["bytes"] // 1024) for grown in part["growth"]]
    return "Soak", text, ("what", "rounds", "tensors more", "KiB more"), rows


def _bad_input(part: Result) -> Section:
    text = (
        "Every option of every command with values that it cannot have, full disks, interrupts, hostile and damaged"
        " files, bad calls of modules and functions: one clear error, exit code 2, no file half written, no statistics"
        f" moved. {_tests(part)}"
    )
    return "Bad input", text, (), []


def _concurrency(part: Result) -> Section:
    text = (
        "Eight threads at one model, training beside a copy that serves, processes forked and spawned after use,"
        f" loaders. {_tests(part)}"
    )
    return "Threads and processes", text, (), []


def _faults(part: Result) -> Section:
    faults = part["faults"]
    seen = sum(fault["seen"] for fault in faults)
    text = f"One at a time, in a copy of the sources: {seen} of {len(faults)} are seen by the tests named."
    rows = [
        (fault["what"], f"`{fault['file']}`", f"`{fault['tests']}`", "yes" if fault["seen"] else "**no**")
        for fault in faults
    ]
    return "Planted faults", text, ("fault", "in", "tests", "seen"), rows


SECTIONS: dict[str, Callable[[Result], Section]] = {
    "cases": _cases,
    "properties": _properties,
    "fuzz": _fuzz,
    "memory": _memory,
    "bad_input": _bad_input,
    "concurrency": _concurrency,
    "faults": _faults,
}
