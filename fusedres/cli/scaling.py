"""How time and memory grow with the batch, the depth and the side of the pictures: fused must grow no faster."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from fusedres import measure
from fusedres.cli import console, proof
from fusedres.cli.contest import CHANNELS_LAST, FUSED, Contest, layout
from fusedres.cli.peers import EVAL, TRAIN
from fusedres.cli.results import Ratio, Row, row_of

#: A series measures no further points once it took so long.
SECONDS = 90
#: Pictures that a point is proved with.
PROVED = 2


class Point(NamedTuple):
    """One network at one size of its input; ``value``: where it stands on its axis."""

    value: int
    arch: str
    batch: int
    image_size: int


AXES: dict[str, tuple[Point, ...]] = {
    "batch": tuple(Point(n, "resnet18", n, 224) for n in (1, 2, 4, 8, 16, 32, 64)),
    "depth": tuple(Point(depth, f"resnet{depth}", 2, 224) for depth in (18, 34, 50, 101, 152)),
    "depth of CIFAR networks": tuple(Point(depth, f"cifar_resnet{depth}", 16, 32) for depth in (20, 32, 44, 56, 110)),
    "image size": tuple(Point(side, "resnet18", 2, side) for side in (64, 128, 192, 256, 384)),
}


def measure_all(dtype: torch.dtype, device: torch.device, memory: str, seed: int, rounds: int) -> Iterator[Row]:
    """A row for each point of each axis in both modes, eager channels_last against fused."""
    for (axis, points), mode in itertools.product(AXES.items(), (EVAL, TRAIN)):
        start = time.monotonic()
        with console.progress(f"scaling: {axis}, {mode}", len(points)) as advance:
            for done, point in enumerate(points):
                if done and time.monotonic() - start > SECONDS:
                    break
                advance(done, str(point.value))
                contest = Contest(point.arch, memory, dtype, device, seed)
                yield {"axis": axis, "mode": mode, **point._asdict(), **_measure(contest, mode, point, rounds)}


def _measure(contest: Contest, mode: str, point: Point, rounds: int) -> Row:
    x, target = contest.inputs(point.batch, point.image_size, None)
    if not proof.agrees(contest, mode, x[:PROVED]):
        raise proof.NotEqualError(f"{point.arch}, {mode}, {point.image_size}x{point.image_size}")
    samples = contest.time(mode, x, target, rounds, lambda done: None, only=(CHANNELS_LAST, FUSED))
    row = row_of(samples, point.batch)
    if mode == TRAIN:
        x = layout(CHANNELS_LAST, x)
        row["saved_bytes"] = {who: measure.saved_bytes(contest.models[who], x) for who in (CHANNELS_LAST, FUSED)}
    return row


def series(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each (axis, mode), in order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["axis"], row["mode"]), []).append(row)
    return found


def faster_growth(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Neighbours between which the fused time grew faster than eager's: their ratio fell by more than its spread."""
    return [(a, b) for a, b in itertools.pairwise(rows) if _ratio(a).fell_to(_ratio(b))]


def _ratio(row: Row) -> Ratio:
    return Ratio(row["ratio_to"][CHANNELS_LAST], row["spread"][CHANNELS_LAST])
