"""``fusedres train``: train a network, on one process or on as many as ``torchrun`` starts.

SGD with momentum 0.9 and weight decay 1e-4; the learning rate is divided by 10 at one half and three quarters of the
run (He et al. 2015). ``--out`` receives checkpoint.pt after each epoch, metrics.csv, metrics.json, curve.png and, at
the end, model.pt with the weights. ``--resume`` goes on from the checkpoint as if the run had never stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedres.cli import common, console, environment, networks
from fusedres.training import (
    CHECKPOINT,
    CheckpointError,
    Data,
    DataError,
    History,
    Settings,
    TrainingDiverged,
    fit,
    open_data,
    record,
    save_checkpoint,
    schedule,
    workers,
)

HELP = "train a network; resumable, also under torchrun"
EXIT_DIVERGED = 1

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
#: (epochs, batch, learning rate) that suit a data set.
DEFAULTS = {"digits": (20, 64, 0.1), "cifar10": (164, 128, 0.1), "imagefolder": (90, 256, 0.1)}
#: Nets whose last stage has 1/32 of the picture's side need larger digits than the CIFAR nets.
DIGITS_SIZE = {"cifar": 16, "imagenet": 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser, arch="cifar_resnet20")
    parser.add_argument("--data", default="digits", help="digits (default), cifar10:PATH or imagefolder:PATH")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/train"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=common.positive, help="side of the pictures (default: what data and net suit)"
    )
    parser.add_argument("--epochs", type=common.positive, help="default: 20 digits, 164 cifar10, 90 imagefolder")
    parser.add_argument("--batch", type=common.positive, help="of all processes together; default: 64, 128, 256")
    parser.add_argument("--lr", type=common.positive_float, help="learning rate at the start (default: 0.1)")
    parser.add_argument("--max-steps", type=common.positive, help="stop after so many steps in all; --resume goes on")
    parser.add_argument("--amp", action="store_true", help="autocast: float16 on a GPU, bfloat16 on a CPU")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--eager", action="store_true", help="train the eager twin instead, for comparison")
    parser.add_argument(
        "--workers", type=common.natural, default=0, help="processes that load pictures (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    """Train. Returns the exit code: 1 where the loss is no longer a number."""
    common.set_threads(args.threads)
    networks.check(args.arch)
    common.writable_folder(args.out)
    device = workers.start(common.select_device(args.device))
    try:
        with common.select_engine(args.engine):
            return _train(args, device)
    except (DataError, CheckpointError) as error:
        raise common.UserError(_last_line(error)) from None
    except TrainingDiverged as error:
        print(f"fusedres: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    finally:
        workers.stop()


def _last_line(error: Exception) -> str:
    """What ``error`` says. One of a loader's process comes with that process's traceback before it."""
    kind = type(error)
    return str(error).rstrip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")


def _train(args: argparse.Namespace, device: torch.device) -> int:
    data = open_data(args.data, args.image_size or _image_size(args), args.seed)
    settings = _settings(args, data)
    model = networks.place(_model(args, data), device)
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
        _finish(args, settings, model, history)
    return 0


def _image_size(args: argparse.Namespace) -> int | None:
    """The side of the pictures, where the data's own default does not suit the network."""
    if args.data != "digits":
        return None
    return DIGITS_SIZE["cifar" if args.arch.startswith("cifar") else "imagenet"]


def _settings(args: argparse.Namespace, data: Data) -> Settings:
    epochs, batch, lr = DEFAULTS[data.name]
    settings = Settings(
        arch=args.arch,
        data=data.name,
        image_size=data.test[0][0].shape[-1],
        epochs=args.epochs or epochs,
        batch=args.batch or batch,
        lr=args.lr or lr,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        warmup=0,
        seed=args.seed,
        amp=args.amp,
        eager=args.eager,
        memory=args.memory,
    )
    if settings.batch % workers.count():
        raise common.UserError(f"--batch {settings.batch} cannot be shared equally among {workers.count()} processes")
    if settings.batch > len(data.train):
        raise common.UserError(f"--batch {settings.batch} is more than the {len(data.train)} pictures of {args.data}")
    warmup = schedule.warmup_steps(networks.depth_of(args.arch), settings.total_steps(data))
    return dataclasses.replace(settings, warmup=warmup)


def _model(args: argparse.Namespace, data: Data) -> nn.Module:
    fused = networks.build(args.arch, args.memory, data.num_classes, args.seed)
    return networks.eager_twin(args.arch, fused)[0] if args.eager else fused


def _title(args: argparse.Namespace, settings: Settings, data: Data, device: torch.device) -> str:
    kind = "eager" if settings.eager else "fused"
    size = settings.image_size
    return (
        f"{kind} {settings.arch} on {settings.data} ({len(data.train)} training and {len(data.test)} held-out pictures"
        f" of {size}x{size}), {settings.epochs} epochs of batch {settings.batch}, {device},"
        f" {workers.count()} process{'es' if workers.count() > 1 else ''} -> {args.out}"
    )


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


def _finish(args: argparse.Namespace, settings: Settings, model: nn.Module, history: History) -> None:
    """The weights, the curve and a last line."""
    save_checkpoint(model.state_dict(), args.out / "model.pt")
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
