"""``fusedres convert``: a trained ResNet for inference alone, BN folded into its convs.

CHECKPOINT is torchvision's, timm's or this package's, plain or as training scripts wrap it. ``--to`` is the file that
``fusedres predict --weights`` and ``evaluate`` run; ``--onnx`` is standard ONNX for any number of pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedres import artefact
from fusedres.card import FOLDED, Card
from fusedres.cli import common, trained
from fusedres.cli.common import UserError

HELP = "a checkpoint for inference: BN folded, as safetensors or ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what predict --weights takes")
    parser.add_argument("--arch", help=f"network (default: {trained.DEFAULT_ARCH})")
    parser.add_argument("--to", type=Path, metavar="FILE.safetensors", help="write the folded network")
    parser.add_argument("--onnx", type=Path, metavar="FILE.onnx", help="write it as ONNX")
    parser.add_argument("--image-size", type=common.positive, help="side of the input (default: what the weights say)")


def run(args: argparse.Namespace) -> int:
    """Convert. Returns the exit code."""
    _check_outputs(args)
    network = trained.load(args.checkpoint, args.arch, args.image_size)
    folded = network.model if network.folded else artefact.fold(network.model)
    side = network.preprocessing.crop
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    difference = _difference(network.logits(x), dataclasses.replace(network, model=folded).logits(x))
    card = Card(network.arch, dataclasses.asdict(network.preprocessing), FOLDED)
    if args.to:
        _write(args.to, artefact.to_bytes(folded, card))
    if args.onnx:
        _write(args.onnx, _onnx(folded, card, x))
    print(f"{network.arch}: the folded logits differ by {difference:.1e}, relatively")
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """UserError, before any work is done, for what could not be written in the end."""
    outputs = ((args.to, ".safetensors", ("safetensors",)), (args.onnx, ".onnx", ("onnx", "onnxscript")))
    if not any(path for path, _, _ in outputs):
        raise UserError("nothing to write: name a file with --to or --onnx")
    for path, suffix, packages in outputs:
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise UserError(f"{path} should end in {suffix}")
        for package in packages:
            try:
                importlib.import_module(package)
            except ImportError:
                raise UserError(f"writing {path} needs {package}: pip install 'fusedres[deploy]'") from None
        common.writable_file(path)


def _write(path: Path, content: bytes) -> None:
    common.write(path, content)
    print(f"written: {path} ({len(content) / 2**20:.1f} MiB)")


def to_onnx(model: nn.Module, x: torch.Tensor) -> Any:
    """``model`` as an ONNX model: ``pictures`` (N, C, H, W) like ``x`` -> ``logits`` (N, classes), N free."""
    x = torch.cat([x[:1], x[:1]])  # of a single picture the exporter would fix N
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            verbose=False,
            input_names=["pictures"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None  # it is None only where a file was named
    return program.model_proto


def _onnx(folded: nn.Module, card: Card, x: torch.Tensor) -> bytes:
    """The folded network as ONNX, with its card."""
    model = to_onnx(artefact.without_norms(folded), x)
    for key, value in card.metadata().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return model.SerializeToString()


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """How far ``found`` is from ``expected``, relative in the Euclidean norm."""
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
