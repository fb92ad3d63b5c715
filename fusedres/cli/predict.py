"""``fusedres predict``: what pictures show, by a trained network.

Pictures are files of any kind that Pillow reads, or folders of them. The labels are ImageNet's where the network has
1000 classes, else the classes' numbers. Pictures are normalised as the published weights want it, or as
``fusedres train`` did it; as ImageNet's where the weights do not say. Those that cannot be read are left out and told
of at the end.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedres.cli import common, console, photo, trained
from fusedres.cli.common import UserError
from fusedres.cli.trained import Trained

HELP = "labels of pictures, with probabilities"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture, or folder of pictures")
    trained.add_options(parser)
    parser.add_argument("--top", type=common.positive, default=5, help="labels a picture (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Predict. Returns the exit code."""
    common.set_threads(args.threads)
    device = common.select_device(args.device)
    if args.json:
        common.writable_file(args.json)
    paths = photo.find(args.images)
    network = trained.load(args.weights, args.arch, args.image_size)
    results: list[dict[str, Any]] = []
    refused: list[UserError] = []
    with common.select_engine(args.engine), console.progress("predicting", len(paths)) as advance:
        network = network.on(device)
        for start in range(0, len(paths), args.batch):
            pictures = list(_pictures(paths[start : start + args.batch], network, refused))
            if pictures:
                results += _predict(network, pictures, args.top)
            advance(min(start + args.batch, len(paths)))
    _report(args, network, results, refused)
    return 0


def _pictures(paths: list[Path], network: Trained, refused: list[UserError]) -> Iterator[tuple[Path, Tensor]]:
    """The inputs made of the files that can be read; why another cannot is added to ``refused``."""
    for path in paths:
        try:
            yield path, network.preprocessing(photo.open_rgb(path))
        except UserError as error:
            refused.append(error)


def _predict(network: Trained, pictures: list[tuple[Path, Tensor]], top: int) -> list[dict[str, Any]]:
    """The ``top`` classes of each picture, the likeliest first."""
    paths, inputs = zip(*pictures, strict=True)
    best = network.logits(torch.stack(inputs)).softmax(1).topk(min(top, len(network.labels)))
    return [
        {
            "file": str(path),
            "top": [
                {"class": number, "label": network.labels[number], "probability": probability}
                for probability, number in zip(probabilities, numbers, strict=True)
            ],
        }
        for path, probabilities, numbers in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _report(
    args: argparse.Namespace, network: Trained, results: list[dict[str, Any]], refused: list[UserError]
) -> None:
    """The table and the file; UserError where a picture was refused."""
    if args.json:
        record = {
            "arch": network.arch,
            "weights": network.source,
            "pictures": results,
            "refused": list(map(str, refused)),
        }
        common.write(args.json, json.dumps(record, indent=2) + "\n")
    if results:
        rows = [
            (_printable(result["file"]) if rank == 0 else "", guess["label"], f"{100 * guess['probability']:.2f}%")
            for result in results
            for rank, guess in enumerate(result["top"])
        ]
        console.table(f"{network.arch}, {network.source}", ("picture", "label", "probability"), rows)
    if refused:
        others = f" (and {len(refused) - 1} other files)" if len(refused) > 1 else ""
        raise UserError(f"{refused[0]}{others}")


def _printable(name: str) -> str:
    """A file's name for the terminal: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")
