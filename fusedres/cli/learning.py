"""Learning curves of plain and residual nets, shallow and deep: as rows, where they end, and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusedres.cli import networks
from fusedres.training import History
from fusedres.training.checkpoint import write_atomically

Errors = dict[str, float]  # "train_error" and "test_error", 0 to 1

TICKS = (0, 0.1, 1, 10, 100)  # per cent
FAMILIES = {"plain": ("#e8a090", "#b3261e"), "residual": ("#8fb8de", "#12507b")}  # colours: shallow, deep


def rows(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """A row for each epoch of each net, six digits of every number."""
    return [
        {
            "net": net,
            "epoch": row["epoch"],
            "iteration": row["step"],
            **{name: f"{error:.6g}" for name, error in _errors(row).items()},
            **{name: f"{row[name]:.6g}" for name in ("train_loss", "test_loss", "lr", "seconds")},
        }
        for net, history in histories.items()
        for row in history.epochs
    ]


def final_errors(history: History) -> Errors:
    """The mean errors of the last tenth of the epochs; the training error is of the augmented pictures, while they are
    trained on, as in the paper."""
    last = [_errors(row) for row in history.epochs[-final_epochs(len(history.epochs)) :]]
    return {name: sum(errors[name] for errors in last) / len(last) for name in last[0]}


def final_epochs(epochs: int) -> int:
    """How many of ``epochs`` make up a net's final errors: a single one is noisy."""
    return max(1, epochs // 10)


def family_of(net: str) -> str:
    """A key of ``FAMILIES``."""
    return "plain" if "plain" in net else "residual"


def verdict(family: str, ends: Mapping[str, Errors]) -> str:
    """Which of the two nets of a family ends with the higher training error, in a sentence."""
    (shallow, low), (deep, high) = (
        (networks.depth_of(net), errors["train_error"]) for net, errors in ends.items() if family_of(net) == family
    )
    worse = "higher" if high > low else "no higher"
    return (
        f"{family}: {deep} layers end at {100 * high:.2f}% training error, {shallow} layers at {100 * low:.2f}%:"
        f" {worse} with depth"
    )


def draw(histories: Mapping[str, History], title: str, path: Path) -> None:
    """The errors over the iterations, a panel for each family (figures 4 and 6 of the paper)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(FAMILIES), figsize=(10, 4), layout="constrained", sharey=True)
    for axes, (family, colors) in zip(panels, FAMILIES.items(), strict=True):
        nets = [net for net in histories if family_of(net) == family]
        for net, color in zip(nets, colors, strict=True):
            _draw_net(axes, net, histories[net], color)
        axes.set_title(family)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("error (%)")
    panels[0].set_yscale("symlog", linthresh=TICKS[1], linscale=0.3)  # a log axis that has a 0
    panels[0].set_ylim(0, TICKS[-1])
    panels[0].set_yticks(TICKS, map(str, TICKS))
    figure.suptitle(title, fontsize=10)
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    pyplot.close(figure)


def _draw_net(axes: Any, net: str, history: History, color: str) -> None:
    steps = [row["step"] for row in history.epochs]
    for split, style in (("train", "--"), ("test", "-")):
        percent = [100 * _errors(row)[f"{split}_error"] for row in history.epochs]
        name = f"{networks.depth_of(net)} layers, {'training' if split == 'train' else split}"
        axes.plot(steps, percent, style, color=color, linewidth=0.8 if split == "train" else 1.3, label=name)


def _errors(row: Mapping[str, Any]) -> Errors:
    return {f"{split}_error": 1 - row[f"{split}_accuracy"] for split in ("train", "test")}
