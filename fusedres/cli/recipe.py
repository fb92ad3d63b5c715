"""How networks are trained unless the user says otherwise: the ResNet paper's recipe, and the options of a run.

SGD with momentum 0.9 and weight decay 1e-4; the learning rate is divided by 10 at one half and three quarters of the
run; a warm-up from 110 layers on (He et al. 2015, section 4.2).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fusedres.cli import common, networks
from fusedres.training import CheckpointError, Data, DataError, Settings, TrainingDiverged, schedule, workers

EXIT_DIVERGED = 1

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


class Recipe(NamedTuple):
    """What suits a data set."""

    epochs: int
    batch: int
    lr: float


RECIPES = {
    "digits": Recipe(20, 64, 0.1),
    "cifar10": Recipe(164, 128, 0.1),
    "imagefolder": Recipe(90, 256, 0.1),
}


def add_options(parser: argparse.ArgumentParser, out: str, digits: Recipe = RECIPES["digits"]) -> None:
    """What is trained on, how, and where the results go."""
    recipes = {**RECIPES, "digits": digits}
    suits = {
        name: ", ".join(f"{getattr(recipe, name)} {data}" for data, recipe in recipes.items())
        for name in ("epochs", "batch")
    }
    parser.add_argument("--data", default="digits", help="digits (default), cifar10:PATH or imagefolder:PATH")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", default=Path(out), help="where results are written (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=common.positive, help="side of the pictures (default: what data and net suit)"
    )
    parser.add_argument("--epochs", type=common.positive, help=f"default: {suits['epochs']}")
    parser.add_argument("--batch", type=common.positive, help=f"of all processes together; default: {suits['batch']}")
    parser.add_argument("--lr", type=common.positive_float, help="learning rate at the start (default: 0.1)")
    parser.add_argument("--amp", action="store_true", help="autocast: float16 on a GPU, bfloat16 on a CPU")
    parser.add_argument("--resume", action="store_true", help="go on from what is in --out")
    parser.add_argument("--eager", action="store_true", help="train the eager twin instead, for comparison")
    parser.add_argument(
        "--workers", type=common.natural, default=0, help="processes that load pictures (default: none)"
    )
    parser.set_defaults(recipes=recipes)


def run(args: argparse.Namespace, body: Callable[[torch.device], int]) -> int:
    """``body(device)`` on every process that ``torchrun`` started. Returns its exit code, or 1 where a loss is no
    number; UserError where data or a checkpoint cannot be used."""
    common.set_threads(args.threads)
    common.writable_folder(args.out)
    device = workers.start(common.select_device(args.device))
    try:
        with common.select_engine(args.engine):
            return body(device)
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


def settings_of(args: argparse.Namespace, arch: str, data: Data) -> Settings:
    """What determines the run of ``arch`` on ``data``; UserError where the batch does not fit."""
    networks.check(arch)
    recipe = args.recipes[data.name]
    settings = Settings(
        arch=arch,
        data=data.name,
        image_size=data.test[0][0].shape[-1],
        epochs=args.epochs or recipe.epochs,
        batch=args.batch or recipe.batch,
        lr=args.lr or recipe.lr,
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
    warmup = schedule.warmup_steps(networks.depth_of(arch), settings.total_steps(data))
    return dataclasses.replace(settings, warmup=warmup)


def model_of(settings: Settings, data: Data, device: torch.device) -> nn.Module:
    """The network of ``settings`` before its first step."""
    fused = networks.build(settings.arch, settings.memory, data.num_classes, settings.seed)
    return networks.place(networks.eager_twin(settings.arch, fused)[0] if settings.eager else fused, device)


def describe(settings: Settings, data: Data, device: torch.device) -> str:
    """The data and the run, in a line."""
    size = settings.image_size
    return (
        f"{settings.data} ({len(data.train)} training and {len(data.test)} held-out pictures of {size}x{size}),"
        f" {settings.epochs} epochs of batch {settings.batch}, {device},"
        f" {workers.count()} process{'es' if workers.count() > 1 else ''}"
    )
