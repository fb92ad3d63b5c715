"""``fusedres bench``: prove that fused equals eager, then measure both on this machine.

Eager NCHW, eager channels_last and fused take turns; medians are compared, and the ratio is against the faster eager.
A training step is zero_grad, forward, loss and backward, without an optimizer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedres import measure
from fusedres.cli import common, console, environment, networks, photo, plot, proof, report
from fusedres.cli.contest import EAGER, FUSED, TRAINING_STEP, Contest

HELP = "prove that fused equals eager, then time both and count launches and memory"
SCHEMA = 1  # of the JSON; raised when a reader of the old one would err
EXIT_NOT_EQUAL = 1

Inputs = tuple[str, Tensor, Tensor]  # mode, x, target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser, arch="resnet50")
    parser.add_argument("--batch", type=common.positive, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument(
        "--image-size", type=common.positive, help="side of the pictures (default: 224, or 32 for CIFAR nets)"
    )
    parser.add_argument("--dtype", choices=common.DTYPES, default="float32")
    parser.add_argument(
        "--eval", action="store_true", help="inference only (default: both, training at the largest batch)"
    )
    parser.add_argument("--train", action="store_true", help="training only")
    parser.add_argument("--rounds", type=common.positive, default=10, help="turns of each contestant (default: 10)")
    parser.add_argument("--input", type=Path, metavar="PHOTO", help="a picture as the input (default: random numbers)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured, every sample included")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times as a picture (.png, .svg, .pdf)")


def run(args: argparse.Namespace) -> int:
    """Prove, measure, print, write. Returns the exit code: 1 where fused does not equal eager."""
    for path in filter(None, (args.json, args.plot)):
        common.writable_file(path)
    if args.plot:
        plot.check(args.plot)
    common.set_threads(args.threads)
    device = common.select_device(args.device)
    picture = photo.read(args.input, _image_size(args)) if args.input else None
    with common.select_engine(args.engine):
        contest = Contest(args.arch, args.memory, common.DTYPES[args.dtype], device, args.seed)
        inputs = _inputs(args, contest, picture)
        verdicts = _prove(contest, inputs)
        if not all(verdict.holds for verdict in verdicts):
            print("fusedres: fused does NOT equal eager, so nothing is timed", file=sys.stderr)
            return EXIT_NOT_EQUAL
        result = _header(args, contest, device) | {"proof": [verdict.as_dict() for verdict in verdicts]}
        result |= _measure(contest, inputs, args.rounds)
    report.show(result)
    if args.json:
        common.write(args.json, json.dumps(result, indent=1) + "\n")
        print(f"\nwritten: {args.json}")
    if args.plot:
        plot.draw(result, args.plot)
        print(f"drawn: {args.plot}")
    return 0


def _image_size(args: argparse.Namespace) -> int:
    return args.image_size or networks.default_image_size(args.arch)


def _inputs(args: argparse.Namespace, contest: Contest, picture: Tensor | None) -> list[Inputs]:
    """Every (mode, x, target) to be proved and timed."""
    modes = [mode for mode in ("eval", "train") if getattr(args, mode)] or ["eval", "train"]
    inputs = []
    for mode in modes:
        for batch in args.batch if mode == "eval" else [max(args.batch)]:
            x, target = contest.inputs(batch, _image_size(args), picture)
            contest.try_eager(x, mode)
            inputs.append((mode, x, target))
    return inputs


def _prove(contest: Contest, inputs: Sequence[Inputs]) -> list[proof.Verdict]:
    verdicts: list[proof.Verdict] = []
    with console.progress("proving", len(inputs)) as advance:
        for done, (mode, x, target) in enumerate(inputs):
            advance(done, f"{mode}, batch {len(x)}")
            verdicts += proof.prove(contest, mode, x, target)
    report.show_proof(verdicts)
    return verdicts


def _header(args: argparse.Namespace, contest: Contest, device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "settings": {
            "arch": args.arch,
            "image_size": _image_size(args),
            "dtype": args.dtype,
            "device": str(device),
            "engine": args.engine,
            "memory": args.memory,
            "rounds": args.rounds,
            "seed": args.seed,
            "input": "photo" if args.input else "random",
            "eager": contest.baseline,
            "training_step": TRAINING_STEP,
            "clock": "time.perf_counter" + (" after synchronisation" if device.type != "cpu" else ""),
        },
    }


def _measure(contest: Contest, inputs: Sequence[Inputs], rounds: int) -> dict[str, Any]:
    timings = []
    for mode, x, target in inputs:
        with console.progress(f"timing {mode}, batch {len(x)}", rounds) as advance:
            samples = contest.time(mode, x, target, rounds, advance)
        timings.append(_timing(mode, len(x), samples))
    _, x, _ = inputs[-1]
    trains = inputs[-1][0] == "train"
    return {
        "timings": timings,
        "launches": contest.launches(x.shape[-1]),
        "saved_bytes_per_image": contest.saved_bytes(x) if trains else {},
    }


def _timing(mode: str, batch: int, samples: dict[str, list[float]]) -> dict[str, Any]:
    """One row of the result; ``ratio``: how many times faster fused is than the faster eager layout."""
    median = measure.medians(samples)
    return {
        "mode": mode,
        "batch": batch,
        "ratio": min(median[name] for name in EAGER) / median[FUSED],
        "ratio_to": {name: median[name] / median[FUSED] for name in EAGER},
        "median_s": median,
        "images_per_s": {name: batch / seconds for name, seconds in median.items()},
        "samples_s": samples,
    }
