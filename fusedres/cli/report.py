"""``fusedres report``: what a benchmark's JSON says, as tables, as a page, as figures, or put into a document.

``--into FILE`` replaces what stands between the two marks ``<!-- bench:begin -->`` and ``<!-- bench:end -->``.
``--compare OLD NEW`` flags every ratio that fell by more than the spread of its rounds, and then exits with 1.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusedres.cli import common, compare, console, page, plot, results, tables
from fusedres.cli.results import Result

if TYPE_CHECKING:
    from fusedres.cli.proof import Verdict

HELP = "print, draw, compare or put into a document what `fusedres bench --json` has measured"

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json", type=Path, nargs="*", help="files that `fusedres bench --json` wrote")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page of them, with figures and tables")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the page's figures as .png and .svg")
    parser.add_argument("--into", type=Path, metavar="FILE", help="a document with the two marks, as README.md")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times as a picture (.png, .svg, .pdf)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="flag the ratios that fell")


def run(args: argparse.Namespace) -> int:
    """Print the tables, or write what was asked for. Returns the exit code: 1 where a ratio fell."""
    if bool(args.json) == bool(args.compare):
        raise common.UserError("name files to report, or two to --compare")
    if args.compare:
        return compare.run(*args.compare)
    found = [results.read(path) for path in args.json]
    if (args.into or args.plot) and len(found) > 1:
        raise common.UserError("--into and --plot take one file")
    if args.plot:
        plot.check(args.plot)
        plot.draw(found[0], common.writable_file(args.plot))
    if args.into:
        put_into(args.into, found[0])
    if args.html or args.plots:
        plot.check()
        drawn = page.draw(found)
    if args.html:
        common.write(args.html, page.page(found, drawn))
    if args.plots:
        plot.save(itertools.chain(*drawn), common.writable_folder(args.plots))
    if not any((args.plot, args.into, args.html, args.plots)):
        for result in found:
            show(result)
    return 0


def put_into(document: Path, result: Result) -> None:
    """Replace the text between the marks in ``document``."""
    try:
        text = document.read_text()
    except OSError as error:
        raise common.UserError(f"cannot read {document}: {error.strerror}") from None
    marked = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not marked.search(text):
        raise common.UserError(f"{document} has no marks {BEGIN} and {END}")
    block = f"{BEGIN}\n{tables.markdown(result)}\n{END}"
    common.write(document, marked.sub(lambda _: block, text))


def show_proof(verdicts: Sequence[Verdict]) -> None:
    """The proof as a table."""
    console.table(*tables.proof_table([verdict.as_dict() for verdict in verdicts]))


def show(result: Result) -> None:
    """Everything measured as tables."""
    for network in result["networks"]:
        for table in tables.network_tables(result, network):
            console.table(*table)
        for line in tables.left_out(network):
            print(f"  without {line}")
    for table in tables.scaling_tables(result):
        console.table(*table)
