"""The command line: one file a subcommand, each with HELP, ``add_arguments(parser)`` and ``run(args) -> exit code``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import fusedres
from fusedres.cli import bench, convert, evaluate, experiment, explain, info, predict, report, roofline, train
from fusedres.cli.common import Parser, UserError

COMMANDS = {
    "bench": bench,
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
    "convert": convert,
    "experiment": experiment,
    "explain": explain,
    "info": info,
    "report": report,
    "roofline": roofline,
}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``fusedres`` and its subcommands."""
    parser = Parser(prog="fusedres", description="Fused kernels for ResNets in PyTorch.")
    parser.add_argument("--version", action="version", version=f"fusedres {fusedres.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.HELP, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fusedres ARGV``. Returns the exit code: 2 for an error of the user's, 130 where interrupted."""
    try:
        args = make_parser().parse_args(argv)
        return args.run(args)
    except UserError as error:
        print(f"fusedres: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("fusedres: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
