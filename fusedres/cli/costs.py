"""What networks of growing depth cost, and the paper's predecessors beside them: parameters, FLOPs, time, memory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusedres
from fusedres import measure, plan
from fusedres.cli import common, console, contest, environment, networks, zoo
from fusedres.training.checkpoint import write_atomically

#: Of torchvision, converted by ``fusedres.fuse``: how many layers their papers count, and torchvision's options.
PREDECESSORS: dict[str, tuple[int, dict[str, Any]]] = {
    "vgg19_bn": (19, {}),
    "googlenet": (22, {"aux_logits": False, "init_weights": False}),
}
COSTS = "costs.json"
MODES = ("eval", "train")
COLUMNS = ("layers", "M parameters", "GFLOP", "ms inference", "ms training", "MB kept")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is timed: not the pictures that are trained on, for depth pays on large ones."""
    parser.add_argument("--cost-size", type=common.positive, default=224, help="side of the pictures that are timed")
    parser.add_argument("--cost-batch", type=common.positive, default=8, help="how many are timed at once")
    parser.add_argument("--rounds", type=common.positive, default=5, help="times each call is timed (default: 5)")


def measured(args: argparse.Namespace, nets: Sequence[str], device: torch.device) -> dict[str, dict[str, Any]]:
    """What each of ``nets`` and their predecessors costs, as measured now, or alike before and kept in ``--out``."""
    names = [*nets, *PREDECESSORS]
    conditions = {
        "nets": names,
        "size": args.cost_size,
        "batch": args.cost_batch,
        "rounds": args.rounds,
        "eager": args.eager,
        "memory": args.memory,
        "engine": args.engine,
        "device": str(device),
        "machine": environment.machine(),
        "versions": environment.versions(),
    }
    path = args.out / COSTS
    kept = _read(path)
    if kept.get("conditions") != conditions:
        kept = {"conditions": conditions, "costs": _measure(args, names, device)}
        common.write(path, json.dumps(kept, indent=1))
    return kept["costs"]


def cells(cost: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table, below ``COLUMNS``."""
    return (
        str(cost["layers"]),
        f"{cost['parameters'] / 1e6:.1f}",
        f"{cost['flops'] / 1e9:.1f}",
        f"{1e3 * cost['eval_seconds']:.1f}",
        f"{1e3 * cost['train_seconds']:.1f}",
        f"{cost['saved_bytes'] / 1e6:.1f}",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # there is none yet, or somebody damaged it
        return {}


def size(net: str, side: int) -> dict[str, int]:
    """Layers, parameters, and the FLOPs of a picture of ``side`` x ``side`` in inference; nothing is allocated."""
    with torch.device("meta"):
        model = _build(net)
        picture = torch.empty(1, 3, side, side)
    return {
        "layers": PREDECESSORS[net][0] if net in PREDECESSORS else networks.depth_of(net),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": sum(launch.flops for launch in plan.walk(model, {}, picture)),
    }


def _measure(args: argparse.Namespace, nets: Sequence[str], device: torch.device) -> dict[str, dict[str, Any]]:
    """The size of each net; seconds of an inference and a training step, and bytes kept for backward; all a picture.

    The nets take turns, so that whatever else the machine does hits them all.
    """
    models = {net: networks.place(_build(net, args.memory, args.eager), device) for net in nets}
    shape = (args.cost_batch, 3, args.cost_size, args.cost_size)
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.zeros(args.cost_batch, dtype=torch.long, device=device)
    seconds = {}
    for mode in MODES:
        calls = {net: contest.call(mode, model.train(mode == "train"), x, target) for net, model in models.items()}
        with console.progress(f"timing {mode}", args.rounds) as advance:
            samples = measure.interleaved(calls, args.rounds, device, on_round=advance)
        seconds[mode] = measure.medians(samples)
    return {
        net: {
            **size(net, args.cost_size),
            **{f"{mode}_seconds": seconds[mode][net] / args.cost_batch for mode in MODES},
            "saved_bytes": measure.saved_bytes(model.train(), x) / args.cost_batch,
        }
        for net, model in models.items()
    }


def _build(net: str, memory: str = "standard", eager: bool = False) -> nn.Module:
    if net in PREDECESSORS:
        model = zoo.build(f"torchvision:{net}", **PREDECESSORS[net][1])
        return model if eager else fusedres.fuse(model, inplace=True)
    model = networks.build(net, memory)
    return networks.eager_twin(net, model)[0] if eager else model


def draw(nets: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    """Error, time and memory over the depth; the predecessors, which are not trained, as single points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, tuple[str, float]]] = {
        "error (%)": {"training": ("train_error", 100), "test": ("test_error", 100)},
        "time a picture (ms)": {"training step": ("train_seconds", 1e3), "inference": ("eval_seconds", 1e3)},
        "kept for backward (MB a picture)": {"activations": ("saved_bytes", 1e-6)},
    }
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(12, 3.8), layout="constrained")
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        for label, (key, scale) in lines.items():
            _draw_line(
                axes, [(name, net["layers"], scale * net[key]) for name, net in nets.items() if key in net], label
            )
        axes.set_xlabel("layers")
        axes.set_title(name, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    pyplot.close(figure)


def _draw_line(axes: Any, points: Sequence[tuple[str, int, float]], label: str) -> None:
    nets = [(depth, value) for net, depth, value in points if net not in PREDECESSORS]
    (line,) = axes.plot(*zip(*nets, strict=True), "o-", markersize=3, label=label)
    for net, depth, value in points:
        if net in PREDECESSORS:
            axes.plot(depth, value, "D", markersize=4, color=line.get_color())
            axes.annotate(net, (depth, value), xytext=(4, 3), textcoords="offset points", fontsize=7)
