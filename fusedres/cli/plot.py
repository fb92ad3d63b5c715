"""A benchmark's figures: each of one narrow column, so that a phone shows it without shrinking its letters."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusedres.cli import results, scaling, tables
from fusedres.cli.common import UserError
from fusedres.cli.contest import CHANNELS_LAST, FUSED, NCHW
from fusedres.cli.results import Result, Row

COLORS = {NCHW: "#c4c9d1", CHANNELS_LAST: "#8d96a5", FUSED: "#1f6fb4"}
PEER = "#d9a441"
SUFFIXES = (".png", ".svg", ".pdf")
WIDTH = 4.6  # inches

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "fusedres",  # the same result makes the same file
    "figure.constrained_layout.use": True,
}


class Drawn(NamedTuple):
    """A figure: its file's stem, its title, what it shows in a sentence."""

    name: str
    title: str
    caption: str
    figure: Any

    def svg(self) -> bytes:
        """The figure as an SVG document."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()


def check(path: Path | None = None) -> None:
    """UserError where no figure can be drawn, or none to ``path``."""
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot draw {path}: its name must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'fusedres[cli]'") from None


def draw(result: Result, path: Path) -> None:
    """Draw the times of every network of ``result`` to ``path``."""
    panels = [(network, timing) for network in result["networks"] for timing in network["timings"]]
    figure, axes = _figure([len(timing["median_s"]) for _, timing in panels])
    for (network, timing), axis in zip(panels, axes, strict=True):
        _bars(axis, timing, f"{network['arch']}, {network['image_size']}x{network['image_size']}, ")
    figure.suptitle(f"{results.machine_name(result)}, {result['settings']['dtype']}", fontsize=9)
    figure.savefig(path, dpi=160)


def save_all(found: Sequence[Result], folder: Path) -> list[Path]:
    """Every figure of every result as .png and .svg in ``folder``."""
    paths = []
    for i, result in enumerate(found):
        for drawn in figures(result):
            stem = drawn.name if len(found) == 1 else f"{i + 1}-{drawn.name}"
            for suffix in (".png", ".svg"):
                paths.append(folder / f"{stem}{suffix}")
                drawn.figure.savefig(paths[-1], dpi=160)
    return paths


def figures(result: Result) -> Iterator[Drawn]:
    """Every figure that ``result`` has the measurements for."""
    for network in result["networks"]:
        yield from network_figures(result, network)
    yield from scaling_figures(result)


def network_figures(result: Result, network: Row) -> Iterator[Drawn]:
    """The figures of one network."""
    arch, timings = network["arch"], network["timings"]
    figure, axes = _figure([len(timing["median_s"]) for timing in timings])
    for timing, axis in zip(timings, axes, strict=True):
        _bars(axis, timing)
    caption = "Median milliseconds, with how many times longer than fused. The whisker is the spread over the rounds."
    yield Drawn(f"{arch}-times", f"{arch}: time", caption, figure)
    if network.get("blocks") and "roof" in result:
        yield Drawn(
            f"{arch}-traffic",
            f"{arch}: time against memory traffic",
            "Each distinct block, eager joined to fused. The line is the time that its traffic needs at the bandwidth"
            " of a large copy: what lies below it was served by caches.",
            _traffic(network["blocks"], result["roof"]),
        )
        yield Drawn(
            f"{arch}-roofline",
            f"{arch}: roofline",
            "Each distinct block: floating-point operations a byte of planned traffic, and how many of them a second."
            " The line is what this machine's copy and matrix product reach.",
            _roofline(network["blocks"], result["roof"]),
        )
    if network["saved_bytes_per_image"]:
        caption = "Activations kept from forward to backward, MB an image."
        yield Drawn(f"{arch}-memory", f"{arch}: memory", caption, _memory(network["saved_bytes_per_image"]))


def scaling_figures(result: Result) -> Iterator[Drawn]:
    """A figure for each axis of the scaling."""
    axes = dict.fromkeys(row["axis"] for row in result.get("scaling", ()))
    for axis in axes:
        rows = [row for row in result["scaling"] if row["axis"] == axis]
        caption = "Median time of a call, and activations kept for backward; both axes logarithmic."
        yield Drawn(f"scaling-{axis.replace(' ', '-')}", f"Scaling with {axis}", caption, _scaling(axis, rows))


def _figure(bars: Sequence[int]) -> tuple[Any, list[Any]]:
    """A figure with a panel for each group of that many bars."""
    pyplot = _pyplot()
    heights = [0.62 + 0.24 * count for count in bars]
    figure, axes = pyplot.subplots(
        len(bars), 1, figsize=(WIDTH, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    return figure, list(axes[:, 0])


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(STYLE)
    pyplot.close("all")
    return pyplot


def _bars(axis: Any, timing: Row, title: str = "") -> None:
    """A bar for each contestant, the shortest the best, with its ratio to fused."""
    names = tables.contestants([timing])
    times = [1e3 * timing["median_s"][name] for name in names]
    whiskers = [1e3 * timing["median_s"][FUSED] * timing["spread"].get(name, 0) / 2 for name in names]
    colors = [COLORS.get(name, PEER) for name in names]
    bars = axis.barh(names, times, xerr=whiskers, color=colors, height=0.72, error_kw={"lw": 0.8, "alpha": 0.6})
    ratios = [f"{timing['ratio_to'][name]:.2f}x" if name != FUSED else "" for name in names]
    axis.bar_label(bars, [f"{ms:.1f}  {ratio}" for ms, ratio in zip(times, ratios, strict=True)], padding=6, fontsize=8)
    axis.set_title(f"{title}{timing['mode']}, batch {timing['batch']}: {timing['ratio']:.2f}x eager's speed")
    axis.set_xlim(0, 1.4 * max(times))
    axis.set_xlabel("ms", loc="right", fontsize=8, labelpad=-8)
    axis.invert_yaxis()


def _by_mode(blocks: Sequence[Row]) -> dict[str, list[Row]]:
    return {mode: [b for b in blocks if b["mode"] == mode] for mode in dict.fromkeys(b["mode"] for b in blocks)}


def _traffic(blocks: Sequence[Row], roof: Row) -> Any:
    pyplot, modes = _pyplot(), _by_mode(blocks)
    figure, axes = pyplot.subplots(len(modes), 1, figsize=(WIDTH, 2.6 * len(modes)), squeeze=False)
    for axis, (mode, rows) in zip(axes[:, 0], modes.items(), strict=True):
        points = {
            who: [(row["plans"][who]["bytes"] / 1e6, 1e3 * row["median_s"][who]) for row in rows]
            for who in (CHANNELS_LAST, FUSED)
        }
        for eager, fused in zip(*points.values(), strict=True):
            axis.plot(*zip(eager, fused, strict=True), color="#c4c9d1", lw=0.8, zorder=1)
        for who, of_who in points.items():
            axis.scatter(*zip(*of_who, strict=True), s=22, color=COLORS[who], label=who, zorder=2)
        ends = [min(x for p in points.values() for x, _ in p), max(x for p in points.values() for x, _ in p)]
        axis.plot(
            ends, [1e9 * x / roof["bytes_per_s"] for x in ends], color="black", lw=0.8, ls="--", label="bandwidth"
        )
        axis.set(xscale="log", yscale="log", ylabel="ms", title=f"{mode}, batch {rows[0]['input'][0]}")
    axes[0, 0].legend()
    axes[-1, 0].set_xlabel("MB of planned traffic")
    return figure


def _roofline(blocks: Sequence[Row], roof: Row) -> Any:
    figure, axis = _pyplot().subplots(figsize=(WIDTH, 3.2))
    markers = {"eval": "o", "train": "^"}
    intensities = []
    for mode, rows in _by_mode(blocks).items():
        for who in (CHANNELS_LAST, FUSED):
            plans = [(row["plans"][who], row["median_s"][who]) for row in rows]
            x = [plan["flops"] / plan["bytes"] for plan, _ in plans]
            intensities += x
            y = [1e-9 * plan["flops"] / seconds for plan, seconds in plans]
            axis.scatter(x, y, s=22, marker=markers[mode], color=COLORS[who], label=f"{who}, {mode}")
    peak, bandwidth = roof["flops_per_s"], roof["bytes_per_s"]
    x = sorted([min(intensities) / 1.5, peak / bandwidth, max(*intensities, peak / bandwidth) * 1.5])
    axis.plot(x, [1e-9 * min(peak, bandwidth * i) for i in x], color="black", lw=0.8, ls="--", label="roof")
    axis.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="GFLOP/s")
    axis.legend()
    return figure


def _memory(saved: dict[str, float]) -> Any:
    names = {"eager": "eager", "standard": "fused", "recompute": "fused, recompute"}
    names = {key: text for key, text in names.items() if key in saved}
    figure, (axis,) = _figure([len(names)])
    values = [saved[key] / 1e6 for key in names]
    colors = [COLORS[CHANNELS_LAST] if key == "eager" else COLORS[FUSED] for key in names]
    bars = axis.barh(list(names.values()), values, color=colors, height=0.72)
    axis.bar_label(bars, [f"{v:.1f}  {v / values[0]:.0%}" for v in values], padding=4, fontsize=8)
    axis.set_xlim(0, 1.3 * max(values))
    axis.set_xlabel("MB an image", loc="right", fontsize=8)
    axis.invert_yaxis()
    return figure


def _scaling(name: str, rows: Sequence[Row]) -> Any:
    figure, (time, memory) = _pyplot().subplots(2, 1, figsize=(WIDTH, 5), sharex=True, height_ratios=(3, 2))
    styles = {"eval": "o-", "train": "^-"}
    for (_, mode), points in scaling.series(rows).items():
        values = [row["value"] for row in points]
        for who in (CHANNELS_LAST, FUSED):
            style = {"color": COLORS[who], "ms": 4, "lw": 1.2}
            milliseconds = [1e3 * row["median_s"][who] for row in points]
            time.plot(values, milliseconds, styles[mode], label=f"{who}, {mode}", **style)
            if "saved_bytes" in points[0]:
                memory.plot(values, [row["saved_bytes"][who] / 1e6 for row in points], styles[mode], **style)
    ticks = sorted({row["value"] for row in rows})
    for axis, label in ((time, "ms"), (memory, "MB kept for backward")):
        axis.set(xscale="log", yscale="log", ylabel=label)
    memory.set_xticks(ticks, [str(tick) for tick in ticks])
    memory.minorticks_off()
    memory.set_xlabel(name)
    time.legend()
    return figure
