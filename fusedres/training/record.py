"""The record of a run on disk: metrics as CSV and JSON, the learning curve as PNG."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedres.training.checkpoint import write_atomically
from fusedres.training.history import COLUMNS, History


def write_metrics(history: History, settings: dict[str, Any], machine: dict[str, Any], out: Path) -> None:
    """``metrics.csv`` (a row an epoch) and ``metrics.json`` (that, every step's loss, the settings, the machine)."""
    record = {"settings": settings, "machine": machine, "epochs": history.epochs, "step_loss": history.loss}
    write_atomically(out / "metrics.csv", lambda file: file.write(as_csv(COLUMNS, history.epochs)))
    write_atomically(out / "metrics.json", lambda file: file.write(json.dumps(record, indent=1).encode()))


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """The rows as a CSV file; what a row lacks stays empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def plot_curve(history: History, title: str, path: Path) -> bool:
    """Loss and accuracy over the epochs as a picture; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = [row["epoch"] for row in history.epochs]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, metric, scale in ((left, "loss", 1), (right, "accuracy", 100)):
        for split, style in (("train", "--"), ("test", "-")):
            axes.plot(epochs, [scale * row[f"{split}_{metric}"] for row in history.epochs], style, label=split)
        axes.set_xlabel("epoch")
        axes.set_title(metric if scale == 1 else f"{metric} (%)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    left.set_yscale("log")
    figure.suptitle(title)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    pyplot.close(figure)
    return True
