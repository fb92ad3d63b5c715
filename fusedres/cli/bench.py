"""``fusedres bench``: prove that fused equals eager, then measure both on this machine.

Eager NCHW, eager channels_last and fused take turns; medians are compared, and the ratio is against the faster eager.
With ``--peers`` everything else that is installed and runs the network takes part too, its numbers compared first.
A training step is zero_grad, forward, loss and backward, without an optimizer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedres import roofline
from fusedres.cli import common, console, environment, networks, page, photo, plot, proof, report, results, scaling
from fusedres.cli.contest import CHANNELS_LAST, FUSED, TRAINING_STEP, Contest
from fusedres.cli.peers import EVAL, TRAIN
from fusedres.cli.plans import CONV, EAGER, MODES, Planner
from fusedres.cli.results import Result, Row
from fusedres.roofline import Bound, Roof

HELP = "prove that fused equals eager, then time both and count launches and memory"
EXIT_NOT_EQUAL = 1
#: Of each contestant the plan that it runs.
PLAN_OF = {CHANNELS_LAST: EAGER, FUSED: CONV}

Inputs = tuple[str, Tensor, Tensor]  # mode, x, target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser, arch="resnet50", many=True)
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
    parser.add_argument("--peers", action="store_true", help="time everything else installed that runs the network")
    parser.add_argument("--bounds", action="store_true", help="time each block too, beside its traffic and FLOPs")
    parser.add_argument("--scaling", action="store_true", help="time and memory by batch, depth and image size too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured, every sample included")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times as a picture (.png, .svg, .pdf)")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="write FOLDER/<machine>/<date>.json, and the page and plots of it",
    )


def run(args: argparse.Namespace) -> int:
    """Prove, measure, print, write. Returns the exit code: 1 where fused does not equal eager."""
    for path in filter(None, (args.json, args.plot)):
        common.writable_file(path)
    if args.plot or args.results:
        plot.check(args.plot)
    if args.results:
        common.writable_folder(args.results)
    for arch in args.arch:
        networks.check(arch)
    common.set_threads(args.threads)
    device = common.select_device(args.device)
    result = _header(args, device)
    stored = results.stored_under(args.results, result) if args.results else None
    files = [path for path in (args.json, stored) if path]
    try:
        with common.select_engine(args.engine):
            for _ in _measure(args, device, result):
                _keep(result, files)
    except proof.NotEqualError as error:
        print(f"fusedres: fused does NOT equal eager ({error}), so nothing of it is timed", file=sys.stderr)
        return EXIT_NOT_EQUAL
    report.show(result)
    for path in files:
        print(f"\nwritten: {path}")
    if args.plot:
        plot.draw(result, args.plot)
        print(f"drawn: {args.plot}")
    if stored:
        (drawn,) = page.draw([result])
        common.write(stored.with_suffix(".html"), page.page([result], [drawn]))
        plot.save(drawn, common.writable_folder(stored.with_suffix("")))
        print(f"drawn: {stored.with_suffix('.html')}, figures in {stored.with_suffix('')}")
    return 0


def _keep(result: Result, files: Sequence[Path]) -> None:
    """Write what is there: a run that is stopped later has not been for nothing."""
    result["load"]["after"] = os.getloadavg()
    for path in files:
        common.write(path, json.dumps(result, indent=1) + "\n")


def _measure(args: argparse.Namespace, device: torch.device, result: Result) -> Iterator[None]:
    """Add to ``result`` what is measured, a part at a time."""
    dtype = common.DTYPES[args.dtype]
    if args.bounds:
        result["roof"] = roofline.measured(device, dtype)._asdict()
    for arch in args.arch:
        size = args.image_size or networks.default_image_size(arch)
        picture = photo.read(args.input, size) if args.input else None
        contest = Contest(arch, args.memory, dtype, device, args.seed)
        inputs = _inputs(args, contest, size, picture)
        verdicts = _prove(contest, inputs)
        if not all(verdict.holds for verdict in verdicts):
            raise proof.NotEqualError(arch)
        roof = Roof(**result["roof"]) if args.bounds else None
        result["networks"].append(_measure_network(args, contest, size, inputs, verdicts, roof))
        yield
    if args.scaling:
        result["scaling"] = []
        for row in scaling.measure_all(dtype, device, args.memory, args.seed, args.rounds):
            result["scaling"].append(row)
            yield


def _inputs(args: argparse.Namespace, contest: Contest, size: int, picture: Tensor | None) -> list[Inputs]:
    """Every (mode, x, target) to be proved and timed."""
    modes = [mode for mode in (EVAL, TRAIN) if getattr(args, mode)] or [EVAL, TRAIN]
    inputs = []
    for mode in modes:
        for batch in args.batch if mode == EVAL else [max(args.batch)]:
            x, target = contest.inputs(batch, size, picture)
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


def _header(args: argparse.Namespace, device: torch.device) -> Result:
    """What the figures depend on."""
    return {
        "schema": results.SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "load": {"before": os.getloadavg()},
        "settings": {
            "dtype": args.dtype,
            "device": str(device),
            "engine": args.engine,
            "memory": args.memory,
            "rounds": args.rounds,
            "seed": args.seed,
            "input": "photo" if args.input else "random",
            "training_step": TRAINING_STEP,
            "clock": "time.perf_counter" + (" after synchronisation" if device.type != "cpu" else ""),
        },
        "networks": [],
    }


def _measure_network(
    args: argparse.Namespace,
    contest: Contest,
    size: int,
    inputs: Sequence[Inputs],
    verdicts: list[proof.Verdict],
    roof: Roof | None,
) -> dict[str, Any]:
    timings, blocks = [], []
    largest = {mode: len(x) for mode, x, _ in inputs}
    for mode, x, target in inputs:
        what = f"{contest.arch}, {mode}, batch {len(x)}"
        if args.peers:
            contest.invite(mode, x)
            with console.progress(f"peers of {what}", len(contest.peers)) as advance:
                verdicts += proof.admit(contest, mode, x, advance)
        with console.progress(f"timing {what}", args.rounds) as advance:
            samples = contest.time(mode, x, target, args.rounds, advance)
        timing = {"mode": mode, "batch": len(x), **results.row_of(samples, len(x))}
        contest.peers = {}
        if roof is not None:
            planner = Planner(contest.arch, contest.memory, contest.dtype, contest.device.type, mode == TRAIN)
            plans = {plan: planner.plan(plan, len(x), size) for plan in MODES}
            timing["plans"] = {plan: roofline.bound(launches, roof)._asdict() for plan, launches in plans.items()}
            if len(x) == largest[mode]:
                layers = {plan: roofline.by_layer(plans[plan], roof) for plan in PLAN_OF.values()}
                blocks += [_block_row(row, mode, layers) for row in contest.time_blocks(mode, x, args.rounds)]
        timings.append(timing)
    _, x, _ = inputs[-1]
    return {
        "arch": contest.arch,
        "image_size": size,
        "eager": contest.baseline,
        "proof": [verdict.as_dict() for verdict in verdicts],
        "timings": timings,
        "blocks": blocks,
        "left_out": [{"peer": p, "mode": mode, "why": why} for (p, mode), why in contest.left_out.items()],
        "launches": contest.launches(size),
        "saved_bytes_per_image": contest.saved_bytes(x) if inputs[-1][0] == TRAIN else {},
    }


def _block_row(row: Row, mode: str, layers: dict[str, dict[str, Bound]]) -> Row:
    """The times of a block beside the traffic, the FLOPs and the bound of the plan that each contestant runs."""
    timed = results.row_of(row["samples_s"], row["input"][0])
    plans = {who: layers[plan][row["block"]]._asdict() for who, plan in PLAN_OF.items()}
    return row | {"mode": mode, **timed, "plans": plans}
