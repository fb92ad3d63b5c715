"""The command line: one file a subcommand, each with HELP, ``add_arguments(parser)`` and ``run(args) -> exit code``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import torch

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

#: What PyTorch says where a tensor would be too large for this machine, or for any.
NO_MEMORY = ("not enough memory", "Storage size calculation overflowed")


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files are of any bytes
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
    except (OSError, MemoryError, RuntimeError) as error:
        reason = _exhausted(error)
        if reason is None:
            raise
        print(f"fusedres: {reason}", file=sys.stderr)
        return EXIT_USER_ERROR


def _exhausted(error: Exception) -> str | None:
    """What the machine had too little of, or would not let be read or written; None where it is no such error."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(map(str(error).__contains__, NO_MEMORY))
    return f"not enough memory: {str(error).splitlines()[0] or 'it is used up'}" if is_memory else None
