"""``fusedres evaluate``: how often a trained network is right about the pictures of a folder.

``--data imagefolder:PATH``: PATH/val/CLASS/* or PATH/CLASS/*; the classes in order of name are the network's outputs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from fusedres.cli import common, console, photo, trained
from fusedres.cli.common import UserError
from fusedres.cli.trained import Trained

HELP = "top-1 and top-5 accuracy on a folder of pictures"
TOP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="imagefolder:PATH, with a folder for each class")
    trained.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate. Returns the exit code."""
    common.set_threads(args.threads)
    device = common.select_device(args.device)
    if args.json:
        common.writable_file(args.json)
    folder = _folder(args.data)
    network = trained.load(args.weights, args.arch, args.image_size)
    data = _open(folder, network)
    start = time.perf_counter()
    with common.select_engine(args.engine):
        top1, top5 = _count(network.on(device), data, args.batch)
    result: dict[str, Any] = {
        "arch": network.arch,
        "weights": network.source,
        "data": str(folder),
        "pictures": len(data),
        "top1": top1 / len(data),
        "top5": top5 / len(data),
        "seconds": time.perf_counter() - start,
    }
    if args.json:
        common.write(args.json, json.dumps(result, indent=2) + "\n")
    rows = [(name, f"{100 * result[key]:.2f}%") for name, key in (("top-1", "top1"), (f"top-{TOP}", "top5"))]
    rate = len(data) / result["seconds"]
    title = f"{network.arch}, {network.source}: {len(data)} pictures of {folder}, {rate:.1f} a second"
    console.table(title, ("accuracy", "right"), rows)
    return 0


def _folder(spec: str) -> Path:
    kind, _, path = spec.partition(":")
    if kind != "imagefolder" or not path:
        raise UserError(f"unknown data {spec!r}: expected imagefolder:PATH")
    validation = Path(path) / "val"
    return validation if validation.is_dir() else Path(path)


def _open(folder: Path, network: Trained) -> Any:
    """Pairs of input and class; UserError where ``folder`` has none, or not as many classes as the network."""
    from torchvision.datasets import ImageFolder

    try:
        data = ImageFolder(str(folder), transform=network.preprocessing, loader=photo.open_rgb)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} is no image folder (CLASS/*): {reason}") from None
    if len(data.classes) != len(network.labels):
        raise UserError(f"{folder} has {len(data.classes)} classes, {network.source} tells {len(network.labels)} apart")
    return data


def _count(network: Trained, data: Any, batch: int) -> tuple[int, int]:
    """How often the class is the network's first guess, and how often among its first five."""
    top1 = top5 = done = 0
    with console.progress("evaluating", len(data)) as advance:
        for x, target in DataLoader(data, batch):
            guesses = network.logits(x).topk(min(TOP, len(network.labels))).indices.cpu()
            hits = guesses == target[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            done += len(target)
            advance(done)
    return top1, top5
