"""``fusedres report``: what a benchmark's JSON says, as tables, as a figure, or put into a document.

``--into FILE`` replaces what stands between the two marks ``<!-- bench:begin -->`` and ``<!-- bench:end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedres.cli import common, console, plot
from fusedres.cli.contest import CHANNELS_LAST, EAGER, FUSED, NCHW

if TYPE_CHECKING:
    from fusedres.cli.proof import Verdict

HELP = "print, draw or put into a document what `fusedres bench --json` has measured"

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
CONTESTANTS = (*EAGER, FUSED)

Rows = list[tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json", type=Path, help="a file that `fusedres bench --json` wrote")
    parser.add_argument("--into", type=Path, metavar="FILE", help="a document with the two marks, as README.md")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times as a picture (.png, .svg, .pdf)")


def run(args: argparse.Namespace) -> int:
    """Print the tables, or write what was asked for. Returns the exit code."""
    result = read(args.json)
    if args.plot:
        plot.check(args.plot)
        plot.draw(result, common.writable_file(args.plot))
    if args.into:
        put_into(args.into, result)
    if not args.plot and not args.into:
        show(result)
    return 0


def read(path: Path) -> dict[str, Any]:
    """The result in ``path``. UserError where it is missing or something else."""
    try:
        result = json.loads(path.read_text())
        if result["schema"] != 1:
            raise common.UserError(f"{path} has schema {result['schema']}, this version reads 1")
        markdown(result)  # asks for everything that a result must have
        return result
    except OSError as error:
        raise common.UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise common.UserError(f"{path} was not written by `fusedres bench --json`") from None


def put_into(document: Path, result: dict[str, Any]) -> None:
    """Replace the text between the marks in ``document``."""
    try:
        text = document.read_text()
    except OSError as error:
        raise common.UserError(f"cannot read {document}: {error.strerror}") from None
    marked = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not marked.search(text):
        raise common.UserError(f"{document} has no marks {BEGIN} and {END}")
    block = f"{BEGIN}\n{markdown(result)}\n{END}"
    common.write(document, marked.sub(lambda _: block, text))


def show_proof(verdicts: Sequence[Verdict]) -> None:
    """The proof as a table."""
    rows = [
        (
            v.mode,
            str(v.batch),
            v.what,
            v.dtype,
            f"{v.error:.1e}",
            "-" if v.eager_error is None else f"{v.eager_error:.1e}",
            f"{v.bound:.1e}",
            "holds" if v.holds else "FAILS",
        )
        for v in verdicts
    ]
    columns = ("mode", "batch", "what", "dtype", "fused error", "eager error", "allowed", "")
    console.table("proof: relative error against eager in float64", columns, rows)


def show(result: dict[str, Any]) -> None:
    """Times, launches and memory as tables."""
    for title, columns, rows in tables(result):
        console.table(title, columns, rows)


def tables(result: dict[str, Any]) -> list[tuple[str, tuple[str, ...], Rows]]:
    """``(title, columns, rows)`` of every table of a result."""
    settings = result["settings"]
    size = settings["image_size"]
    of = f"{settings['arch']}, {size}x{size}, {settings['dtype']}, {settings['device']}"
    found = [(f"time: {of}", *_times(result["timings"])), ("launches per block", *_launches(result["launches"]))]
    if result["saved_bytes_per_image"]:
        found.append(("activations kept for backward", *_memory(result["saved_bytes_per_image"])))
    return found


def _times(timings: list[dict[str, Any]]) -> tuple[tuple[str, ...], Rows]:
    columns = ("", "batch", "speed-up", *(f"{name} ms" for name in CONTESTANTS), "fused images/s")
    rows = [
        (
            t["mode"],
            str(t["batch"]),
            f"{t['ratio']:.2f}x",
            *(f"{1e3 * t['median_s'][name]:.1f}" for name in CONTESTANTS),
            f"{t['images_per_s'][FUSED]:.1f}",
        )
        for t in timings
    ]
    return columns, rows


def _launches(launches: list[dict[str, Any]]) -> tuple[tuple[str, ...], Rows]:
    parts = ("forward", "backward", "eval")
    columns = ("block", "kind", *(f"{part}: fused / eager" for part in parts))
    rows = [
        (row["block"], row["kind"], *(f"{row[FUSED][part]} / {row[CHANNELS_LAST][part]}" for part in parts))
        for row in launches
    ]
    return columns, rows


def _memory(saved: dict[str, float]) -> tuple[tuple[str, ...], Rows]:
    names = {"eager": "eager", "standard": 'fused, memory="standard"', "recompute": 'fused, memory="recompute"'}
    return ("", "MB an image"), [(text, f"{saved[name] / 1e6:.1f}") for name, text in names.items() if name in saved]


def markdown(result: dict[str, Any]) -> str:
    """The result as Markdown: where it was measured, and the tables."""
    machine, versions = result["machine"], result["versions"]
    where = [machine["cpu"], f"{machine['threads']} threads", machine["isa"], *machine["gpus"]]
    where += [f"torch {versions['torch']}", f"commit {result['commit']}" if result["commit"] else "no commit"]
    eager = "torchvision's model" if result["settings"]["eager"] == "torchvision" else "the same modules one by one"
    lines = [
        f"Measured by `fusedres bench` on: {', '.join(where)}.",
        f"Eager is {eager}; medians of {result['settings']['rounds']} interleaved rounds; the speed-up is over the"
        f" faster of {NCHW} and {CHANNELS_LAST}; a training step is {result['settings']['training_step']}.",
    ]
    for title, columns, rows in tables(result):
        lines += ["", f"**{title}**", "", _line(columns), _line(["---"] * len(columns)), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
