"""What a benchmark's JSON says as tables of text, and where and how it was measured in words."""

from __future__ import annotations

from collections.abc import Sequence

from fusedres.cli import scaling
from fusedres.cli.contest import CHANNELS_LAST, FUSED, NCHW
from fusedres.cli.plans import MODES
from fusedres.cli.results import Result, Row

Rows = list[tuple[str, ...]]
Table = tuple[str, tuple[str, ...], Rows]  # title, columns, rows


def proof_table(verdicts: Sequence[Row]) -> Table:
    """Every line of the proof."""
    rows: Rows = [
        (
            v["mode"],
            str(v["batch"]),
            v.get("contestant", FUSED),
            v["what"],
            v["dtype"],
            f"{v['error']:.1e}",
            "-" if v["eager_error"] is None else f"{v['eager_error']:.1e}",
            f"{v['bound']:.1e}",
            "holds" if v["holds"] else "FAILS",
        )
        for v in verdicts
    ]
    columns: tuple[str, ...] = ("mode", "batch", "contestant", "what", "dtype", "error", "eager error", "allowed", "")
    return "proof: relative error against eager in float64 (a peer's: against eager)", columns, rows


def network_tables(result: Result, network: Row) -> list[Table]:
    """All tables of one network."""
    found = main_tables(result, network)
    if any("plans" in timing for timing in network["timings"]):
        found.append(("traffic, FLOPs and bounds", *_plans(network["timings"])))
    if network.get("blocks"):
        found.append(("blocks: measured, and the share of the bound reached", *_blocks(network["blocks"])))
    return found


def main_tables(result: Result, network: Row) -> list[Table]:
    """Times, launches and memory."""
    settings, size = result["settings"], network["image_size"]
    of = f"{network['arch']}, {size}x{size}, {settings['dtype']}, {settings['device']}"
    found = [(f"time: {of}", *_times(network["timings"])), ("launches per block", *_launches(network["launches"]))]
    if network["saved_bytes_per_image"]:
        found.append(("activations kept for backward", *_memory(network["saved_bytes_per_image"])))
    return found


def contestants(timings: Sequence[Row]) -> list[str]:
    """Who was timed, eager first and fused last."""
    return sorted(dict.fromkeys(name for t in timings for name in t["median_s"]), key=lambda name: name == FUSED)


def _times(timings: Sequence[Row]) -> tuple[tuple[str, ...], Rows]:
    def cell(timing: Row, name: str) -> str:
        if name not in timing["median_s"]:
            return "-"
        ms = f"{1e3 * timing['median_s'][name]:.1f}"
        return ms if name == FUSED else f"{ms} ({timing['ratio_to'][name]:.2f}x)"

    columns = ("ms (times fused's)", *(f"{t['mode']}, batch {t['batch']}" for t in timings))
    rows = [(name, *(cell(t, name) for t in timings)) for name in contestants(timings)]
    rows.append(("speed-up over eager", *(f"{t['ratio']:.2f}x" for t in timings)))
    rows.append(("fused images/s", *(f"{t['images_per_s'][FUSED]:.1f}" for t in timings)))
    return columns, rows


def _launches(launches: list[Row]) -> tuple[tuple[str, ...], Rows]:
    parts = ("forward", "backward", "eval")
    columns = ("block", "kind", *(f"{part}: fused / eager" for part in parts))
    rows = [
        (row["block"], row["kind"], *(f"{row[FUSED][part]} / {row[CHANNELS_LAST][part]}" for part in parts))
        for row in launches
    ]
    return columns, rows


def _memory(saved: dict[str, float]) -> tuple[tuple[str, ...], Rows]:
    names = {"eager": "eager", "standard": 'fused, memory="standard"', "recompute": 'fused, memory="recompute"'}
    return ("", "MB an image"), [(text, f"{saved[name] / 1e6:.1f}") for name, text in names.items() if name in saved]


def _plans(timings: Sequence[Row]) -> tuple[tuple[str, ...], Rows]:
    columns = ("", "batch", "plan", "launches", "MB", "GFLOP", "bound ms", "reached by fused")
    rows: Rows = [
        (
            timing["mode"],
            str(timing["batch"]),
            mode,
            str(plan["launches"]),
            f"{plan['bytes'] / 1e6:.1f}",
            f"{plan['flops'] / 1e9:.2f}",
            f"{1e3 * plan['seconds']:.1f}",
            f"{plan['seconds'] / timing['median_s'][FUSED]:.0%}",
        )
        for timing in timings
        for mode, plan in ((mode, timing["plans"][mode]) for mode in MODES)
    ]
    return columns, rows


def _blocks(blocks: Sequence[Row]) -> tuple[tuple[str, ...], Rows]:
    columns = ("block", "times", "", "batch", "eager ms", "fused ms", "speed-up", "MB eager", "MB fused", "of bound")
    rows: Rows = [
        (
            block["block"],
            str(block["count"]),
            block["mode"],
            str(block["input"][0]),
            *(f"{1e3 * block['median_s'][who]:.2f}" for who in (CHANNELS_LAST, FUSED)),
            f"{block['ratio']:.2f}x",
            *(f"{block['plans'][who]['bytes'] / 1e6:.1f}" for who in (CHANNELS_LAST, FUSED)),
            f"{block['plans'][FUSED]['seconds'] / block['median_s'][FUSED]:.0%}",
        )
        for block in blocks
    ]
    return columns, rows


def left_out(network: Row) -> list[str]:
    """Which peers took no part, a line for each mode and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in network.get("left_out", ()):
        found.setdefault((one["mode"], one["why"]), []).append(one["peer"])
    return [f"{', '.join(peers)} in {mode}: {why}" for (mode, why), peers in found.items()]


def scaling_tables(result: Result) -> list[Table]:
    """A table for each axis and mode; the last column says where fused grew faster than eager."""
    tables = []
    for (axis, mode), rows in scaling.series(result.get("scaling", ())).items():
        worse = {id(b): f"faster: {a['ratio']:.2f}x to {b['ratio']:.2f}x" for a, b in scaling.faster_growth(rows)}
        columns: tuple[str, ...] = (axis, "network", "eager ms", "fused ms", "speed-up", "fused grows")
        columns += ("MB kept eager", "MB kept fused") if mode == "train" else ()
        cells = []
        for i, row in enumerate(rows):
            saved = [f"{n / 1e6:.1f}" for n in row.get("saved_bytes", {}).values()]
            growth = worse.get(id(row), "no faster") if i else "-"
            ms = (f"{1e3 * row['median_s'][who]:.1f}" for who in (CHANNELS_LAST, FUSED))
            cells.append((str(row["value"]), row["arch"], *ms, f"{row['ratio']:.2f}x", growth, *saved))
        at = f"batch {rows[0]['batch']}, " if "depth" in axis or "size" in axis else ""
        tables.append((f"scaling with {axis}: {at}{mode}", columns, cells))
    return tables


def markdown(result: Result) -> str:
    """The result as Markdown: where it was measured, and the tables of times, launches and memory."""
    lines = [where(result), how(result)]
    for network in result["networks"]:
        for title, columns, rows in main_tables(result, network):
            lines += ["", f"**{title}**", "", _line(columns), _line(["---"] * len(columns)), *map(_line, rows)]
    return "\n".join(lines)


def where(result: Result) -> str:
    """The machine and the versions in a sentence."""
    machine, versions = result["machine"], result["versions"]
    parts = [machine["cpu"], f"{machine['threads']} threads", machine["isa"], *machine["gpus"]]
    parts += [f"torch {versions['torch']}", f"commit {result['commit']}" if result["commit"] else "no commit"]
    return f"Measured by `fusedres bench` on: {', '.join(parts)}."


def how(result: Result) -> str:
    """What the figures mean in a sentence."""
    own = all(network["eager"] == "torchvision" for network in result["networks"])
    eager = "torchvision's model" if own else "torchvision's model, or the same modules one by one where it has none"
    settings = result["settings"]
    return (
        f"Eager is {eager}; medians of {settings['rounds']} interleaved rounds; the speed-up is over the faster of"
        f" {NCHW} and {CHANNELS_LAST}; a training step is {settings['training_step']}."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
