"""``fusedres roofline``: what a network must move and multiply, and how long that takes at least.

Launches, bytes and FLOPs are those of the real network, walked without a device: eager, fused as the dispatcher plans
it, and fused by whole blocks. They are held against the figures that a GPU's maker publishes, or against what is
measured here. With ``--results`` the times of a benchmark are held against their bounds.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusedres import roofline
from fusedres.cli import common, console, environment, networks, results
from fusedres.cli.peers import TRAIN
from fusedres.cli.plans import CONV, MODE_TEXT, MODES, Planner
from fusedres.cli.results import Result, Row
from fusedres.engines import nvidia
from fusedres.plan import Launch
from fusedres.roofline import Bound, Roof

HELP = "how much traffic and arithmetic a network needs, and the least time that takes"
MEASURED = "measured"
SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser, arch="resnet50")
    gpus = ", ".join(roofline.GPUS)
    parser.add_argument("--gpu", default=MEASURED, help=f"{gpus}, or {MEASURED}: this machine (default: %(default)s)")
    parser.add_argument("--batch", type=common.positive, default=32, help="batch size (default: %(default)s)")
    parser.add_argument(
        "--image-size", type=common.positive, help="side of the pictures (default: 224, or 32 for CIFAR nets)"
    )
    parser.add_argument("--dtype", choices=common.DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--eval", action="store_true", help="inference (the default)")
    step.add_argument("--train", action="store_true", help="a training step without optimizer")
    parser.add_argument("--mode", choices=MODES, default=CONV, help="whose layers are listed (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="JSON", help="a benchmark to hold against its bounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")


def run(args: argparse.Namespace) -> int:
    """Count, bound, print, write. Returns the exit code."""
    result = results.read(args.results) if args.results else None
    if args.json:
        common.writable_file(args.json)
    common.set_threads(args.threads or (result["machine"]["threads"] if result else None))
    with common.select_engine(args.engine):
        if result is not None:
            return _hold_against(args, result)
        dtype = common.DTYPES[args.dtype] if args.dtype else None
        roof, device_type, dtype = _roof(args, dtype)
        planner = Planner(args.arch, args.memory, dtype, device_type, args.train)
        size = args.image_size or networks.default_image_size(args.arch)
        with nvidia.planning(roof.capability):
            plans = {mode: planner.plan(mode, args.batch, size) for mode in MODES}
            _show_header(planner, roof, args.batch, size)
    _show_modes(plans, roof, args.batch)
    _show_layers(plans[args.mode], args.mode, roof)
    if args.json:
        facts = {
            "arch": args.arch,
            "batch": args.batch,
            "image_size": size,
            "training": args.train,
            "dtype": str(dtype),
        }
        written = {"schema": SCHEMA, "commit": environment.commit(), **facts, "roof": roof._asdict()}
        common.write(args.json, json.dumps(written | {"modes": _as_json(plans, roof)}, indent=1) + "\n")
        print(f"\nwritten: {args.json}")
    return 0


def _roof(args: argparse.Namespace, dtype: torch.dtype | None) -> tuple[Roof, str, torch.dtype]:
    """The roof, the kind of device that is planned for, and the dtype."""
    if args.gpu == MEASURED:
        device = common.select_device(args.device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
        return roofline.measured(device, dtype), device.type, dtype
    if args.gpu not in roofline.GPUS:
        raise common.UserError(f"no GPU is named {args.gpu!r}; there are {', '.join(roofline.GPUS)} and {MEASURED}")
    dtype = dtype or torch.float16
    if dtype not in roofline.GPU_DTYPES:
        raise common.UserError(f"the table has the rates of float16 and bfloat16, not of {str(dtype).split('.')[1]}")
    return roofline.GPUS[args.gpu], "cuda", dtype


def _show_header(planner: Planner, roof: Roof, batch: int, size: int) -> None:
    choice = planner.engine()
    step = "training step, no optimizer" if planner.training else "inference of a frozen model"
    print(f"{planner.arch}, {step}, batch {batch}, {size}x{size}, {str(planner.dtype).split('.')[1]}")
    print(f"{roof.name}: {roof.bytes_per_s / 1e9:.0f} GB/s, {roof.flops_per_s / 1e12:.2f} TFLOP/s ({roof.source})")
    print(f"planned for {planner.device_type}: the engine {choice.engine.name}")
    for name, why in choice.passed_over:
        print(f"  not {name}: {why}")
    print("A bound leaves out caches between launches, which let small maps beat it, and the time to launch.")


def _show_modes(plans: dict[str, list[Launch]], roof: Roof, batch: int) -> None:
    rows = []
    for mode, launches in plans.items():
        b = roofline.bound(launches, roof)
        activations = f"{b.activation_bytes / batch / 1e6:.1f}"
        rows.append((mode, str(b.launches), activations, *_cells(b), f"{batch / b.seconds:.0f}", MODE_TEXT[mode]))
    columns = ("mode", "launches", "activations MB/image", *_CELLS, "images/s at most", "what it is")
    console.table("whole network", columns, rows)


_CELLS = ("MB", "GFLOP", "bound ms", "by traffic")


def _cells(b: Bound) -> tuple[str, ...]:
    """Bytes, FLOPs, the bound and which part of it traffic decides."""
    by_traffic = f"{b.memory_s / b.seconds:.0%}" if b.seconds else "-"
    return f"{b.bytes / 1e6:.1f}", f"{b.flops / 1e9:.2f}", f"{1e3 * b.seconds:.3f}", by_traffic


def _layers(launches: list[Launch], roof: Roof) -> dict[tuple[str, str], Bound]:
    """The bound of every layer, its forward and its backward apart, in the order of the network."""
    parts: dict[tuple[str, str], list[Launch]] = {}
    for launch in launches:
        parts.setdefault((launch.layer, launch.phase), []).append(launch)
    return {key: roofline.bound(part, roof) for key, part in parts.items()}


def _show_layers(launches: list[Launch], mode: str, roof: Roof) -> None:
    rows = [(*key, str(b.launches), *_cells(b)) for key, b in _layers(launches, roof).items()]
    console.table(f"layers, mode {mode}", ("layer", "", "launches", *_CELLS), rows)


def _as_json(plans: dict[str, list[Launch]], roof: Roof) -> dict[str, Any]:
    return {
        mode: {
            "whole": roofline.bound(launches, roof)._asdict(),
            "layers": [
                {"layer": layer, "phase": phase, **b._asdict()} for (layer, phase), b in _layers(launches, roof).items()
            ],
        }
        for mode, launches in plans.items()
    }


def _hold_against(args: argparse.Namespace, result: Result) -> int:
    """Every measured time beside the bounds of the same network, batch, dtype and mode."""
    settings, machine = result["settings"], result["machine"]
    here = environment.machine()
    if args.gpu == MEASURED and any(machine[key] != here[key] for key in ("cpu", "cores", "gpus")):
        raise common.UserError(f"{args.results} was measured on another machine; name its GPU with --gpu")
    dtype = common.DTYPES[settings["dtype"]]
    roof, device_type, _ = _roof(args, dtype)
    if not settings["device"].startswith(device_type):
        raise common.UserError(f"{args.results} was measured on {settings['device']}, the roof is of {roof.name}")
    print(f"{roof.name}: {roof.bytes_per_s / 1e9:.0f} GB/s, {roof.flops_per_s / 1e12:.2f} TFLOP/s ({roof.source})")
    for network in result["networks"]:
        planner_of = functools.partial(Planner, network["arch"], settings["memory"], dtype, device_type)
        _show_shares(network, planner_of, roof)
    return 0


def _show_shares(network: Row, planner_of: Callable[[bool], Planner], roof: Roof) -> None:
    """The times of a network, and of its blocks where they were timed, beside their bounds."""
    arch, size = network["arch"], network["image_size"]
    whole, blocks = [], []
    for timing in network["timings"]:
        planner = planner_of(timing["mode"] == TRAIN)
        plans = [planner.plan(mode, timing["batch"], size) for mode in MODES]
        step = f"{arch} {timing['mode']}"
        whole += _shares((step, str(timing["batch"])), timing, [roofline.bound(plan, roof).seconds for plan in plans])
        layers = [roofline.by_layer(plan, roof) for plan in plans]
        for block in network.get("blocks", ()):
            if (block["mode"], block["input"][0]) == (timing["mode"], timing["batch"]):
                bounds = [layer[block["block"]].seconds for layer in layers]
                blocks += _shares((f"{block['block']} {block['mode']}", str(timing["batch"])), block, bounds)
    columns = ("", "batch", "contestant", "measured ms", *(f"{mode} bound reached" for mode in MODES))
    console.table("share of the bound reached", columns, whole)
    if blocks:
        console.table("share of the bound reached, block by block", columns, blocks)


def _shares(first: tuple[str, ...], measured: Row, bounds: list[float]) -> list[tuple[str, ...]]:
    return [
        (*first, name, f"{1e3 * seconds:.1f}", *(f"{bound / seconds:.0%}" for bound in bounds))
        for name, seconds in measured["median_s"].items()
    ]
