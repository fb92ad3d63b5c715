"""Output for people: tables and progress, with rich where it is installed, plain text otherwise."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

HAS_RICH = importlib.util.find_spec("rich") is not None
PLAIN_WIDTH = 160  # of rich's tables where stdout is no terminal


class Advance(Protocol):
    """Moves a progress bar to ``done`` of its total."""

    def __call__(self, done: int, text: str = "") -> None: ...


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are aligned to the right where they hold numbers."""
    numeric = [
        bool(rows) and all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows) for i in range(len(columns))
    ]
    if HAS_RICH:
        _rich_table(title, columns, rows, numeric)
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    print(f"\n{title}")
    for row in (columns, *rows):
        cells = (cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True))
        print("  " + "  ".join(cells).rstrip())


def _rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    for name, right in zip(columns, numeric, strict=True):
        grid.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(escape, row))
    print()
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(grid)


def no_progress(done: int, text: str = "") -> None:
    """An ``Advance`` that shows nothing."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """A progress bar on stderr where that is a terminal; nothing elsewhere, so that logs stay readable."""
    if not sys.stderr.isatty():
        yield no_progress
    elif HAS_RICH:
        with _rich_progress(title, total) as advance:
            yield advance
    else:
        yield lambda done, text="": print(f"\r{title} {done}/{total} {text}\x1b[K", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)


@contextmanager
def _rich_progress(title: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, text="": bar.update(task, completed=done, description=f"{title} {text}")
