"""Every convolution of a ResNet-50 with every candidate tile on this GPU, beside the vendor's own: for the table.

    python bench/tiles.py [--batch 256] [--forms conv_fprop:eval conv_dgrad:drelu ...] [--seconds 150] [--out FILE]

Builds are compiled by all cores first; then each candidate runs in turn, timed by events, caches cold. Of each problem
the fastest tiles are printed, with the vendor's conv alone (without statistics, prologue or epilogue) and the time that
the bytes of the fused op need at the bandwidth of a large copy. At the end the convs that tensor descriptors serve are
summed up, by their best tile with pointers, with descriptors, and with persistent programs. Exit code 2 where there is
no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu import folder
from static_report import FORMS, STEM_FORMS, bytes_moved, resnet50_problems
from torch import Tensor
from triton.testing import do_bench

from fusedres import roofline
from fusedres.kernels import aot, configs, conv_descriptor
from fusedres.kernels.aot import Operands
from fusedres.kernels.configs import Tile
from fusedres.kernels.groups import tile_class
from fusedres.problem import ConvProblem

DTYPE = torch.float16


class Case(NamedTuple):
    """One op of one problem, in the form that the network calls it in."""

    op: str
    form: str
    problem: ConvProblem
    count: int

    @property
    def is_plain(self) -> bool:
        """Whether the gradient that the op is given is there already."""
        return self.form.startswith("plain ")

    @property
    def candidates(self) -> list[Tile]:
        with configs.planning(configs.machine_name(*torch.cuda.get_device_capability())):
            described = conv_descriptor.candidates(
                self.op, self.problem, arguments(self, Operands(self.problem, DTYPE))
            )
        return configs.candidates(DTYPE.itemsize, *tile_class(self.op, self.problem)) + described

    def __str__(self) -> str:
        p = self.problem
        return f"{self.op} {self.form} {p.C}->{p.K} {p.R}x{p.S} of {p.H}x{p.W} stride {p.stride[0]}"


def cases(batch: int, forms: list[str]) -> Iterator[Case]:
    for problem, count in resnet50_problems().items():
        for op, form in (form.split(":") for form in forms):
            is_stem = problem.C < 16
            if is_stem and op == "conv_dgrad":
                continue
            yield Case(op, STEM_FORMS[op] if is_stem and form == FORMS[op] else form, replace(problem, N=batch), count)


class Gpu(Operands):
    """As the meta operands, on the GPU and with numbers in them."""

    def __init__(self, problem: ConvProblem, dtype: torch.dtype) -> None:
        super().__init__(problem, dtype)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                filled = torch.empty_like(value, device="cuda").normal_()
                setattr(self, name, filled.abs_() if name.endswith("bn") else filled)


def arguments(case: Case, operands: Operands) -> tuple[Any, ...]:
    (calls,) = (calls for op, _, calls in aot.OPS if op == case.op)
    args = dict(calls(operands))[case.form.removeprefix("plain ")]
    return (args[0], None, None, None, 0.0, *args[5:]) if case.is_plain else args


def call_of(case: Case, operands: Gpu) -> Callable[[], Any]:
    (function,) = (function for op, function, _ in aot.OPS if op == case.op)
    args = arguments(case, operands)
    return lambda: function(*args)


def vendor_of(case: Case, operands: Gpu) -> Callable[[], Any]:
    """PyTorch's own conv for the same gradient or output: no statistics, no prologue, no epilogue."""
    p, geometry = case.problem, operands.geometry[:3]
    if case.op == "conv_fprop":
        return lambda: torch.ops.aten.convolution(
            operands.x, operands.w, None, *map(list, geometry), False, [0, 0], p.groups
        )
    mask = [case.op == "conv_dgrad", case.op == "conv_wgrad", False]
    return lambda: torch.ops.aten.convolution_backward(
        operands.y, operands.x, operands.w, None, *map(list, geometry), False, [0, 0], p.groups, mask
    )


def compile_one(item: tuple[Case, Tile]) -> str | None:
    """Run one candidate once, in a process of its own; the compiled kernel stays in Triton's cache."""
    case, tile = item
    try:
        with configs.trying(tile):
            call_of(case, Gpu(case.problem, DTYPE))()
        torch.cuda.synchronize()
    except Exception as error:  # too many registers or too much shared memory: not a candidate here
        return f"{type(error).__name__}: {str(error)[:150]}"
    finally:
        torch.cuda.empty_cache()
    return None


def milliseconds(call: Callable[[], Any]) -> float:
    return float(do_bench(call, warmup=5, rep=25, return_mode="median"))


def measure(case: Case, bandwidth: float, failed: set[tuple[Case, Tile]]) -> dict[str, Any]:
    operands = Gpu(case.problem, DTYPE)
    call, found = call_of(case, operands), {}
    found["table"] = milliseconds(call)
    for tile in case.candidates:
        if (case, tile) not in failed:
            with configs.trying(tile):
                found[str(tile)] = milliseconds(call)
    moved = bytes_moved(aot.Plan(case.op, "train" if case.is_plain else case.form, case.problem, DTYPE, ()))
    flops = 2 * case.problem.gemm_m * case.problem.K * case.problem.C * case.problem.R * case.problem.S
    return {
        "case": str(case),
        "count": case.count,
        "tflops": flops * 1e-12,
        "memory_ms": moved / bandwidth * 1e3,
        "vendor_ms": milliseconds(vendor_of(case, operands)),
        "tiles_ms": dict(sorted(found.items(), key=lambda item: item[1])),
    }


def by_access(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of all convs that have tiles of each kind, with the best of these: pointers, descriptors, and
    descriptors in persistent programs."""
    kinds: dict[str, Callable[[str], bool]] = {
        "pointers": lambda label: "descriptors" not in label,
        "descriptors": lambda label: label.endswith("descriptors"),
        "persistent": lambda label: label.endswith("persistent"),
    }
    total = dict.fromkeys(kinds, 0.0)
    for row in rows:
        best = {
            kind: min((ms for label, ms in row["tiles_ms"].items() if is_of(label)), default=None)
            for kind, is_of in kinds.items()
        }
        if None not in best.values():
            for kind, ms in best.items():
                total[kind] += row["count"] * ms
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--forms", nargs="+", default=[":".join(item) for item in FORMS.items()])
    parser.add_argument("--seconds", type=float, default=150, help="stop measuring after so long")
    parser.add_argument("--out", type=Path, help="tiles.json in bench/results/<gpu> unless told")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured", file=sys.stderr)
        return 2
    start = time.monotonic()
    out = args.out or folder(Path(__file__).parent / "results") / "tiles.json"
    torch.backends.cudnn.benchmark = True
    all_cases = list(cases(args.batch, args.forms))
    todo = [(case, tile) for case in all_cases for tile in case.candidates]
    with multiprocessing.get_context("spawn").Pool(min(len(os.sched_getaffinity(0)), 15)) as pool:
        errors = pool.map(compile_one, todo, chunksize=1)
    failed = {item for item, error in zip(todo, errors, strict=True) if error}
    for (case, tile), error in zip(todo, errors, strict=True):
        if error:
            print(f"{case} {tile}: {error}")
    print(
        f"{len(todo)} candidates, {len(failed)} of them none here, after {time.monotonic() - start:.0f} s", flush=True
    )
    bandwidth, rows = roofline.measured(torch.device("cuda"), DTYPE).bytes_per_s, []
    for case in all_cases:
        if time.monotonic() - start > args.seconds:
            print(f"stopped before {case}")
            break
        rows.append(row := measure(case, bandwidth, failed))
        best = "  ".join(f"{name}: {ms:.3f}" for name, ms in list(row["tiles_ms"].items())[:3])
        print(
            f"{row['case']:55} x{row['count']} memory {row['memory_ms']:.3f} vendor {row['vendor_ms']:.3f}"
            f" table {row['tiles_ms']['table']:.3f}  {best}",
            flush=True,
        )
        out.write_text(json.dumps({"copy_bandwidth": bandwidth, "rows": rows}, indent=1) + "\n")
        torch.cuda.empty_cache()
    print("served by descriptors, ms: " + ", ".join(f"{kind} {ms:.3f}" for kind, ms in by_access(rows).items()))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
