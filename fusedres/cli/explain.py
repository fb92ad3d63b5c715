"""``fusedres explain``: which engine runs each block of a network, and why another does not.

``fusedres explain torchvision:resnet50`` or ``timm:resnet50d`` converts that model first, as ``fusedres.fuse`` does.
"""

from __future__ import annotations

import argparse

import fusedres
from fusedres.cli import console, networks, zoo
from fusedres.cli.common import DTYPES, add_model_options, select_device, select_engine, set_threads

HELP = "which engine runs each block of a network, and why another does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model to convert: torchvision:NAME or timm:NAME (default: --arch)")
    add_model_options(parser, arch="resnet50")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def run(args: argparse.Namespace) -> int:
    """Print a row for each fused block, chain or layer, and each conv that is none. Returns the exit code."""
    device = select_device(args.device)
    set_threads(args.threads)
    if args.model is None:
        name, model = args.arch, networks.build(args.arch, args.memory, seed=args.seed)
    else:
        name, model = args.model, fusedres.fuse(zoo.build(args.model), inplace=True)
    model.to(device, DTYPES[args.dtype])
    with select_engine(args.engine):
        explanation = fusedres.explain(model)
    console.table(
        f"{name} in {args.dtype} on {device}: {explanation.fused} of {explanation.convs} convolutions fused",
        ("block", "kind", "engine", "in eval", "why not another"),
        [tuple(r) for r in explanation],
    )
    return 0
