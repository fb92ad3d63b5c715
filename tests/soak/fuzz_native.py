"""Calls every native op with random arguments, in a process that a fault ends.

    python tests/soak/fuzz_native.py --calls 1000 --seed 0 --sanitize

A right call must answer; a spoiled one may, or must raise one of Python's errors and leave its arguments as they were.
``--sanitize`` builds the library under AddressSanitizer and UndefinedBehaviorSanitizer and starts anew with that. The
call being made is named in ``--trace``, for a process that a sanitizer ended cannot tell any more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import native_calls
import torch
from native_calls import RIGHT, Call
from torch import Tensor

from fusedres import native

sys.path.append(str(Path(__file__).parents[1]))

import sanitizers

ERRORS = (RuntimeError, TypeError, ValueError, IndexError, OverflowError, MemoryError)


def outcome(call: Call) -> str:
    """ "answered" or "refused"; AssertionError for what is neither."""
    tensors = [t for t in _flat(call.args) if isinstance(t, Tensor) and _is_readable(t)]
    before = [t.clone() for t in tensors]
    refusal = None
    try:
        call.run()
    except ERRORS as error:
        refusal = f"{type(error).__name__}: {error}"
    assert call.refusal in (refusal or ""), f"{call} raised {refusal}, not {call.refusal}"
    if refusal is None:
        return "answered"
    assert call.spoiled, f"{call} was right, and raised {refusal}"
    assert all(map(_same_bits, tensors, before)), f"{call} raised {refusal}, and changed its arguments"
    return "refused"


def _flat(values: Sequence[Any]) -> list[Any]:
    return list(itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in values))


def _is_readable(t: Tensor) -> bool:
    if t.layout != torch.strided or t.device.type != "cpu" or t.numel() == 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.untyped_storage().nbytes() >= (t.storage_offset() + last + 1) * t.element_size()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    flat = (t.detach().resolve_neg().reshape(-1).contiguous() for t in (a, b))
    # One element is contiguous whatever its stride is.
    return torch.equal(*(t.as_strided(t.shape, (1,)).view(torch.uint8) for t in flat))


def fuzz(seed: int, count: int, trace: Path | None = None) -> dict[str, Any]:
    """Make ``count`` calls; how many of them, by op, answered and were refused."""
    counts: Counter[tuple[str, str]] = Counter()
    file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if trace else None
    start = time.perf_counter()
    for number, call in enumerate(itertools.islice(native_calls.calls(seed), count)):
        if file is not None:
            os.pwrite(file, f"call {number} of seed {seed}: {call}\n".ljust(4000).encode(), 0)
        counts[call.op, outcome(call)] += 1
    return {
        "seed": seed,
        "calls": count,
        "answered": sum(n for (_, what), n in counts.items() if what == "answered"),
        "refused": sum(n for (_, what), n in counts.items() if what == "refused"),
        "ops": len({op for op, _ in counts}),
        "seconds": round(time.perf_counter() - start, 1),
    }


def start_sanitized() -> None:
    """Become this program with the same options, under sanitizers."""
    assert sanitizers.preloads(), f"needs AddressSanitizer's library beside {sanitizers.COMPILER}"
    path = str(sanitizers.sanitized_package())
    options = [argument for argument in sys.argv if argument != "--sanitize"]
    os.execve(sys.executable, [sys.executable, *options], sanitizers.environment(PYTHONPATH=path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    args = parser.parse_args()
    if args.sanitize:
        start_sanitized()
    assert native.missing is None, native.missing
    names = {schema.partition("(")[0] for schema in native._CPU_SCHEMAS}
    assert names == RIGHT.keys(), f"no calls of {names - RIGHT.keys()}"
    torch.set_num_threads(2)
    json.dump(fuzz(args.seed, args.calls, args.trace), sys.stdout)


if __name__ == "__main__":
    main()
