"""``fusedres experiment``: the experiments of "Deep Residual Learning" (He et al. 2015), trained, tabulated and drawn.

``degradation``: plain nets of 20 and 56 layers against ResNets of the same depths (figures 1 and 6): does the deeper
net end with the higher training error? ``plain-vs-residual``: the same with 18 and 34 layers (figure 4). ``depth``:
ResNets of 18 to 152 layers: error, time and memory, and VGG-19 and GoogLeNet beside them.

``--out`` receives the figure as PNG, its numbers as CSV, a summary as JSON, and a folder for each net with its
checkpoint. After a kill at any moment ``--resume`` goes on from these as if the run had never stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedres.cli import common, console, costs, environment, learning, networks, plot, recipe
from fusedres.cli.recipe import Recipe
from fusedres.training import CHECKPOINT, Data, History, Settings, fit, open_data, record, workers
from fusedres.training.checkpoint import write_atomically

HELP = "the ResNet paper's experiments: degradation, plain-vs-residual, depth"

LINES_A_NET = 10  # of progress


class Experiment(NamedTuple):
    """What is trained, in this order; ``digits_size`` and ``digits``: what suits that data set."""

    help: str
    nets: tuple[str, ...]
    digits_size: int
    digits: Recipe


EXPERIMENTS = {
    "degradation": Experiment(
        "20 against 56 layers, plain and residual",
        ("cifar_plain20", "cifar_plain56", "cifar_resnet20", "cifar_resnet56"),
        8,
        Recipe(80, 64, 0.1),
    ),
    "plain-vs-residual": Experiment(
        "18 against 34 layers, plain and residual",
        ("plain18", "plain34", "resnet18", "resnet34"),
        32,
        Recipe(20, 64, 0.1),
    ),
    "depth": Experiment(
        "error, time and memory from 18 to 152 layers",
        ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        32,
        Recipe(20, 64, 0.1),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, experiment in EXPERIMENTS.items():
        subparser = subparsers.add_parser(name, help=experiment.help, description=f"{experiment.help}.")
        common.add_network_options(subparser)
        recipe.add_options(subparser, f"runs/{name}", experiment.digits)
        if name == "depth":
            costs.add_options(subparser)


def run(args: argparse.Namespace) -> int:
    """Train, measure, print, draw, write. Returns the exit code: 1 where a loss is no longer a number."""
    plot.check(_figure(args))
    experiment = EXPERIMENTS[args.experiment]
    args.resume |= workers.were_restarted()
    if not args.resume and any((args.out / net / CHECKPOINT).exists() for net in experiment.nets):
        raise common.UserError(f"{args.out} holds an experiment: --resume goes on with it, another --out starts anew")
    return recipe.run(args, lambda device: _run(args, experiment, device))


def _run(args: argparse.Namespace, experiment: Experiment, device: torch.device) -> int:
    data = open_data(args.data, args.image_size or _image_size(args, experiment), args.seed)
    settings = {net: recipe.settings_of(args, net, data) for net in experiment.nets}
    if workers.is_first():
        run = recipe.describe(settings[experiment.nets[0]], data, device)
        print(f"{args.experiment} on {run} -> {args.out}", flush=True)
    measures = args.experiment == "depth" and workers.is_first()
    measured = costs.measured(args, experiment.nets, device) if measures else None
    histories = _train(args, settings, data, device)
    if not workers.is_first():
        return 0
    if measured is not None:
        _report_costs(args, settings, histories, measured)
    else:
        _report_learning(args, settings, histories)
    return 0


def _image_size(args: argparse.Namespace, experiment: Experiment) -> int | None:
    """The side of the pictures that suits the nets; None for that of the data."""
    suits = {"digits": experiment.digits_size, "imagefolder": networks.default_image_size(experiment.nets[0])}
    return suits.get(args.data.partition(":")[0])


def _train(
    args: argparse.Namespace, settings: dict[str, Settings], data: Data, device: torch.device
) -> dict[str, History]:
    """Every net trained to its end, from where its checkpoint stands."""
    steps = {net: one.total_steps(data) for net, one in settings.items()}
    histories: dict[str, History] = {}
    with console.progress("training", sum(steps.values())) as advance:
        for net, one in settings.items():
            before = sum(steps[done] for done in histories)
            folder = common.writable_folder(args.out / net)
            histories[net] = fit(
                recipe.model_of(one, data, device),
                data,
                one,
                folder,
                resume=args.resume and (folder / CHECKPOINT).exists(),
                loader_workers=args.workers,
                on_step=_mover(advance, before, net),
                on_epoch=_reporter(one),
            )
    return histories


def _mover(advance: console.Advance, before: int, net: str) -> Callable[[int], None]:
    """What to do after a step: move the bar, which stood at ``before`` when ``net`` began."""
    return lambda step: advance(before + step, net)


def _reporter(settings: Settings) -> Callable[[History], None]:
    """What to do at the end of an epoch: now and then, print a line."""

    def report(history: History) -> None:
        row = history.epochs[-1]
        if row["epoch"] % max(1, settings.epochs // LINES_A_NET) == 0 or row["epoch"] == settings.epochs:
            print(
                f"{settings.arch}: epoch {row['epoch']}/{settings.epochs}, iteration {row['step']},"
                f" training error {100 * (1 - row['train_accuracy']):.2f}%,"
                f" test error {100 * (1 - row['test_accuracy']):.2f}%",
                flush=True,
            )

    return report


def _report_learning(args: argparse.Namespace, settings: dict[str, Settings], histories: dict[str, History]) -> None:
    """Where the nets end, and whether the deeper of each pair ends worse; their curves."""
    nets = {
        net: {
            "iterations": len(history.loss),
            **learning.final_errors(history),
            "seconds": sum(row["seconds"] for row in history.epochs),
        }
        for net, history in histories.items()
    }
    rows = [
        (
            name,
            str(net["iterations"]),
            _percent(net["train_error"]),
            _percent(net["test_error"]),
            f"{net['seconds']:.0f}",
        )
        for name, net in nets.items()
    ]
    epochs = learning.final_epochs(next(iter(settings.values())).epochs)
    columns = ("net", "iterations", "training error", "test error", "seconds")
    console.table(f"final errors: means of the last {epochs} epochs", columns, rows)
    for family in learning.FAMILIES:
        print(learning.verdict(family, nets))
    learning.draw(histories, _caption(args, settings), _figure(args))
    _write(args, settings, nets, learning.rows(histories))


def _report_costs(
    args: argparse.Namespace,
    settings: dict[str, Settings],
    histories: dict[str, History],
    measured: dict[str, dict[str, Any]],
) -> None:
    """Costs and final errors over the depth."""
    ends = {net: learning.final_errors(history) for net, history in histories.items()}
    nets = {name: {**cost, **ends.get(name, {})} for name, cost in measured.items()}
    size = args.cost_size
    console.table(
        f"a picture of {size}x{size} in a batch of {args.cost_batch}, and the final errors on {args.data}",
        ("net", *costs.COLUMNS, "training error", "test error"),
        [
            (name, *costs.cells(net), _percent(net.get("train_error")), _percent(net.get("test_error")))
            for name, net in nets.items()
        ],
    )
    costs.draw(nets, _caption(args, settings), _figure(args))
    _write(args, settings, nets, [{"net": name, **net} for name, net in nets.items()])


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:.2f}%"


def _figure(args: argparse.Namespace) -> Path:
    return args.out / f"{args.experiment}.png"


def _caption(args: argparse.Namespace, settings: dict[str, Settings]) -> str:
    one = next(iter(settings.values()))
    return (
        f"{args.experiment} on {one.data}, {one.image_size}x{one.image_size}: {one.epochs} epochs of batch {one.batch},"
        f" learning rate {one.lr}, seed {one.seed}"
    )


def _write(
    args: argparse.Namespace,
    settings: dict[str, Settings],
    nets: dict[str, dict[str, Any]],
    rows: list[dict[str, Any]],
) -> None:
    """The numbers as CSV; as JSON what is said of each net, and what that depends on."""
    summary = {
        "experiment": args.experiment,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "nets": {
            name: {"settings": dataclasses.asdict(settings[name])} | net if name in settings else net
            for name, net in nets.items()
        },
    }
    table = record.as_csv(list(rows[0]), rows)
    write_atomically(_figure(args).with_suffix(".csv"), lambda file: file.write(table))
    write_atomically(
        _figure(args).with_suffix(".json"), lambda file: file.write(json.dumps(summary, indent=1).encode())
    )
    print(f"written: {_figure(args)}, .csv, .json")
