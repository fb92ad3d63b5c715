"""A benchmark's figures: each of one narrow column, so that a phone shows it without shrinking its letters."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fusedres.cli import results, scaling, tables
from fusedres.cli.common import UserError, write
from fusedres.cli.contest import CHANNELS_LAST, FUSED, NCHW
from fusedres.cli.peers import FROZEN
from fusedres.cli.results import Result, Row

COLORS = {NCHW: "#c4c9d1", CHANNELS_LAST: "#8d96a5", FUSED: "#1f6fb4", FROZEN: "#7fb0de"}
PEER = "#d9a441"
SCALING = "scaling"
SUFFIXES = (".png", ".svg", ".pdf")
WIDTH = 4.0  # inches

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
    """A figure: its file's stem, the network that it is about or SCALING, its title, a sentence on what it shows."""

    name: str
    about: str
    title: str
    caption: str
    figure: Any

    def svg(self) -> bytes:
        """The figure as an SVG document."""
        return _file(self.figure, "svg", metadata={"Date": None})


def check(path: Path | None = None) -> None:
    """UserError where no figure can be drawn, or none to ``path``."""
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot draw {path}: its name must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'fusedres[cli]'") from None


def draw(result: Result, path: Path) -> None:
    """Draw the ratios of every network of ``result`` to ``path``."""
    titled = {f"{n['arch']}, {n['image_size']}x{n['image_size']}, ": n for n in result["networks"]}
    with _style():
        figure = _ratios(titled)
        figure.suptitle(f"{results.machine_name(result)}, {result['settings']['dtype']}", fontsize=9)
        write(path, _file(figure, path.suffix.lower()[1:]))


def save(drawn: Iterable[Drawn], folder: Path) -> list[Path]:
    """Every figure as .png and .svg in ``folder``."""
    paths = []
    for one in drawn:
        paths += [folder / f"{one.name}.svg", folder / f"{one.name}.png"]
        write(paths[-2], one.svg())
        write(paths[-1], _file(one.figure, "png"))
    return paths


def _file(figure: Any, kind: str, **options: Any) -> bytes:
    """What a file of ``figure`` holds."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, **options)
    return buffer.getvalue()


def figures(result: Result, prefix: str = "") -> Iterator[Drawn]:
    """Every figure that ``result`` has the measurements for; ``prefix`` begins the stems."""
    with _style():
        for network in result["networks"]:
            yield from _network_figures(prefix, result, network)
        yield from _scaling_figures(prefix, result)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def _network_figures(prefix: str, result: Result, network: Row) -> Iterator[Drawn]:
    arch = network["arch"]
    caption = "How many times longer than fused each takes: the median over the rounds, its spread, and milliseconds."
    stem = f"{prefix}{arch}"
    yield Drawn(f"{stem}-ratios", arch, f"{arch}: time", caption, _ratios({"": network}))
    if network.get("blocks") and "roof" in result:
        yield Drawn(
            f"{stem}-traffic",
            arch,
            f"{arch}: time against memory traffic",
            "Each distinct block, eager joined to fused. The line is the time that its traffic needs at the bandwidth"
            " of a large copy: what lies below it was served by caches.",
            _traffic(network["blocks"], result["roof"]),
        )
        yield Drawn(
            f"{stem}-roofline",
            arch,
            f"{arch}: roofline",
            "Each distinct block: floating-point operations a byte of planned traffic, and how many of them a second."
            " The line is what a copy and the better of a matrix product and a convolution reach here.",
            _roofline(network["blocks"], result["roof"]),
        )
    if network["saved_bytes_per_image"]:
        caption = "Activations kept from forward to backward, MB an image."
        yield Drawn(f"{stem}-memory", arch, f"{arch}: memory", caption, _memory(network["saved_bytes_per_image"]))


def _scaling_figures(prefix: str, result: Result) -> Iterator[Drawn]:
    axes = dict.fromkeys(row["axis"] for row in result.get("scaling", ()))
    for axis in axes:
        rows = [row for row in result["scaling"] if row["axis"] == axis]
        caption = "Median time of a call, and activations kept for backward; both axes logarithmic."
        stem = f"{prefix}{SCALING}-{axis.replace(' ', '-')}"
        yield Drawn(stem, SCALING, f"Scaling with {axis}", caption, _scaling(axis, rows))


def _figure(bars: Sequence[int]) -> tuple[Any, list[Any]]:
    """A figure with a panel for each group of that many bars."""
    heights = [0.62 + 0.24 * count for count in bars]
    return _panels(sum(heights), len(bars), height_ratios=heights)


def _panels(height: float, count: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of ``count`` panels, one below the other."""
    from matplotlib.figure import Figure  # not pyplot: it would keep every figure alive

    figure = Figure(figsize=(WIDTH, height))
    return figure, list(figure.subplots(count, 1, squeeze=False, **options)[:, 0])


def _logarithmic(*axes: Any) -> None:
    """Scale them so, with ticks at 1, 2 and 5 that read as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    for axis in axes:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")


def _ratios(titled: Mapping[str, Row]) -> Any:
    """The bars of networks, by what their titles begin with, all to one scale."""
    panels = [(title, timing) for title, network in titled.items() for timing in network["timings"]]
    figure, axes = _figure([len(timing["median_s"]) for _, timing in panels])
    longest = max(1.0, *(ratio for _, timing in panels for ratio in timing["ratio_to"].values()))
    for (title, timing), axis in zip(panels, axes, strict=True):
        _bars(axis, title, timing)
        axis.set_xlim(0, 1.9 * longest)
    return figure


def _bars(axis: Any, title: str, timing: Row) -> None:
    """A bar for each contestant: how many times longer than fused it takes, with the spread over the rounds."""
    names = tables.contestants([timing])
    ratios = [timing["ratio_to"].get(name, 1.0) for name in names]
    whiskers = [timing["spread"].get(name, 0.0) / 2 for name in names]
    colors = [COLORS.get(name, PEER) for name in names]
    bars = axis.barh(names, ratios, xerr=whiskers, color=colors, height=0.72, error_kw={"lw": 0.8, "alpha": 0.6})
    labels = [
        f"{ratio:.2f}x  {1e3 * timing['median_s'][name]:.1f} ms" for name, ratio in zip(names, ratios, strict=True)
    ]
    axis.bar_label(bars, labels, padding=6, fontsize=8)
    axis.axvline(1, color=COLORS[FUSED], lw=0.8, ls=":", zorder=0)
    axis.set_title(f"{title}{timing['mode']}, batch {timing['batch']}")
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(y=0.02)
    axis.invert_yaxis()


def _by_mode(blocks: Sequence[Row]) -> dict[str, list[Row]]:
    return {mode: [b for b in blocks if b["mode"] == mode] for mode in dict.fromkeys(b["mode"] for b in blocks)}


def _traffic(blocks: Sequence[Row], roof: Row) -> Any:
    modes = _by_mode(blocks)
    figure, axes = _panels(2.6 * len(modes), len(modes))
    for axis, (mode, rows) in zip(axes, modes.items(), strict=True):
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
        axis.set(ylabel="ms", title=f"{mode}, batch {rows[0]['input'][0]}")
        _logarithmic(axis.xaxis, axis.yaxis)
    axes[0].legend()
    axes[-1].set_xlabel("MB of planned traffic")
    return figure


def _roofline(blocks: Sequence[Row], roof: Row) -> Any:
    figure, (axis,) = _panels(3.2)
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
    axis.set(xlabel="FLOP / byte", ylabel="GFLOP/s")
    _logarithmic(axis.xaxis, axis.yaxis)
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
    axis.set_xlim(0, 1.35 * max(values))
    axis.set_title("MB an image")
    axis.invert_yaxis()
    return figure


def _scaling(name: str, rows: Sequence[Row]) -> Any:
    figure, (time, memory) = _panels(5, 2, sharex=True, height_ratios=(3, 2))
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
        axis.set_ylabel(label)
        _logarithmic(axis.xaxis, axis.yaxis)
    memory.set_xticks(ticks, [str(tick) for tick in ticks])
    memory.minorticks_off()
    memory.set_xlabel(name)
    time.legend()
    return figure
