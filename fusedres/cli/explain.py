"""``fusedres explain``: which engine runs each block of a network, and why another does not."""

from __future__ import annotations

import argparse

import fusedres
from fusedres.cli import console, networks
from fusedres.cli.common import DTYPES, add_model_options, select_device, select_engine

HELP = "which engine runs each block of a network, and why another does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, arch="resnet50")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def run(args: argparse.Namespace) -> int:
    """Print a row for each fused block or layer. Returns the exit code."""
    device = select_device(args.device)
    model = networks.build(args.arch, args.memory, seed=args.seed).to(device, DTYPES[args.dtype])
    with select_engine(args.engine):
        rows = fusedres.explain(model)
    console.table(
        f"{args.arch} in {args.dtype} on {device}",
        ("block", "kind", "engine", "in eval", "why not another"),
        [tuple(r) for r in rows],
    )
    return 0
