"""``fusedres train``: train a network, on one process or on as many as ``torchrun`` starts.

SGD with momentum 0.9 and weight decay 1e-4; the learning rate is divided by 10 at one half and three quarters of the
run (He et al. 2015). ``--out`` receives checkpoint.pt after each epoch, metrics.csv, metrics.json, curve.png and, at
the end, model.pt with the weights. ``--resume`` goes on from the checkpoint as if the run had never stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fusedres.cli import common, console, environment, recipe
from fusedres.training import (
    CHECKPOINT,
    Data,
    History,
    Settings,
    described_state,
    fit,
    open_data,
    record,
    save_checkpoint,
    workers,
)

HELP = "train a network; resumable, also under torchrun"

#: Nets whose last stage has 1/32 of the picture's side need larger digits than the CIFAR nets.
DIGITS_SIZE = {"cifar": 16, "imagenet": 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser, arch="cifar_resnet20")
    recipe.add_options(parser, out="runs/train")
    parser.add_argument("--max-steps", type=common.positive, help="stop after so many steps in all; --resume goes on")


def run(args: argparse.Namespace) -> int:
    """Train. Returns the exit code: 1 where the loss is no longer a number."""
    return recipe.run(args, lambda device: _train(args, device))


def _train(args: argparse.Namespace, device: torch.device) -> int:
    data = open_data(args.data, args.image_size or _image_size(args), args.seed)
    settings = recipe.settings_of(args, args.arch, data)
    model = recipe.model_of(settings, data, device)
    if workers.is_first():
        print(_title(args, settings, data, device), flush=True)
    with console.progress("training", settings.total_steps(data)) as advance:
        if not workers.is_first():
            advance = console.no_progress
        history = fit(
            model,
            data,
            settings,
            args.out,
            resume=args.resume or (workers.were_restarted() and (args.out / CHECKPOINT).exists()),
            max_steps=args.max_steps,
            loader_workers=args.workers,
            on_step=lambda step: advance(step),
            on_epoch=_reporter(args, settings),
        )
    if workers.is_first():
        _finish(args, settings, data, model, history)
    return 0


def _image_size(args: argparse.Namespace) -> int | None:
    """The side of the pictures, where the data's own default does not suit the network."""
    if args.data != "digits":
        return None
    return DIGITS_SIZE["cifar" if args.arch.startswith("cifar") else "imagenet"]


def _title(args: argparse.Namespace, settings: Settings, data: Data, device: torch.device) -> str:
    kind = "eager" if settings.eager else "fused"
    return f"{kind} {settings.arch} on {recipe.describe(settings, data, device)} -> {args.out}"


def _reporter(args: argparse.Namespace, settings: Settings) -> Callable[[History], None]:
    """What to do at the end of an epoch: print its line, write the metrics."""
    machine = environment.machine()

    def report(history: History) -> None:
        row = history.epochs[-1]
        print(
            f"epoch {row['epoch']:3d}/{settings.epochs}  lr {row['lr']:.4f}"
            f"  train loss {row['train_loss']:.4f} accuracy {100 * row['train_accuracy']:.2f}%"
            f"  test loss {row['test_loss']:.4f} accuracy {100 * row['test_accuracy']:.2f}%"
            f"  {row['images_per_s']:.0f} images/s",
            flush=True,
        )
        record.write_metrics(history, dataclasses.asdict(settings), machine, args.out)

    return report


def _finish(args: argparse.Namespace, settings: Settings, data: Data, model: nn.Module, history: History) -> None:
    """The weights, the curve and a last line."""
    save_checkpoint(described_state(model, settings, data), args.out / "model.pt")
    if not history.epochs:
        print(f"stopped after {len(history.loss)} steps, before the end of an epoch")
        return
    if not record.plot_curve(history, f"{settings.arch} on {settings.data}", args.out / "curve.png"):
        print("no curve.png: it needs matplotlib (pip install 'fusedres[cli]')")
    best = max(history.epochs, key=_accuracy)
    last = history.epochs[-1]
    print(
        f"held-out accuracy {100 * _accuracy(last):.2f}% (best {100 * _accuracy(best):.2f}% in epoch {best['epoch']}),"
        f" {sum(row['seconds'] for row in history.epochs):.0f} s of training; results in {args.out}"
    )


def _accuracy(row: dict[str, Any]) -> float:
    return row["test_accuracy"]
