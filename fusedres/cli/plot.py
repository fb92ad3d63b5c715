"""The benchmark as a figure: a bar for each contestant, grouped by what was timed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fusedres.cli.common import UserError, write
from fusedres.cli.contest import CHANNELS_LAST, FUSED, NCHW

COLORS = {NCHW: "#c4c9d1", CHANNELS_LAST: "#8d96a5", FUSED: "#1f6fb4"}
SUFFIXES = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """UserError where no figure can be drawn to ``path``."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot draw {path}: its name must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'fusedres[cli]'") from None


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the medians of ``result`` to ``path``, the shortest bar the best, each with its ratio to fused."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timings, settings, machine = result["timings"], result["settings"], result["machine"]
    figure, panels = pyplot.subplots(
        len(timings), 1, figsize=(8, 0.7 + 1.15 * len(timings)), layout="constrained", squeeze=False
    )
    for axes, timing in zip(panels[:, 0], timings, strict=True):
        _draw_bars(axes, timing)
    panels[-1, 0].set_xlabel("milliseconds, median (less is better)")
    where = ", ".join(machine["gpus"]) if settings["device"].startswith("cuda") else machine["cpu"]
    figure.suptitle(
        f"{settings['arch']}, {settings['image_size']}x{settings['image_size']}, {settings['dtype']}: {where},"
        f" {machine['threads']} threads, torch {result['versions']['torch']}",
        fontsize=9,
    )
    drawing = io.BytesIO()
    figure.savefig(drawing, dpi=160, format=path.suffix.lower()[1:])
    pyplot.close(figure)
    write(path, drawing.getvalue())


def _draw_bars(axes: Any, timing: dict[str, Any]) -> None:
    names = list(COLORS)
    times = [1e3 * timing["median_s"][name] for name in names]
    bars = axes.barh(names, times, color=[COLORS[name] for name in names], height=0.7)
    ratios = [f"{timing['ratio_to'][name]:.2f}x the time of fused" for name in names if name != FUSED]
    labels = [f"{ms:.1f} ms  {text}" for ms, text in zip(times, [*ratios, ""], strict=True)]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_title(f"{timing['mode']}, batch {timing['batch']}: {timing['ratio']:.2f}x", fontsize=9, loc="left")
    axes.set_xlim(0, 1.3 * max(times))
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
