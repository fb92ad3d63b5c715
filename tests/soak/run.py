"""The long runs behind docs/reliability.md, and that document of what came out.

    python tests/soak/run.py                all of them, as `make soak` does
    python tests/soak/run.py fuzz memory    these, beside what the others found last
    python tests/soak/run.py --report       the document alone

Results are kept in tests/soak/results.json. Exit code 1 where a part failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import report

from fusedres.cli import environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"

FUZZ_CALLS = 10_000
ISAS = ("", "baseline")  # the machine's best, and what every machine has

Result = dict[str, Any]


class PartFailed(Exception):
    """A run that did not pass, with the end of what it said."""


def run(*command: str, **environ: str) -> str:
    """Stdout of ``python *command``; PartFailed where its exit code is not 0."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PartFailed(f"{' '.join(command)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def pytest(*arguments: str) -> tuple[ElementTree.Element, str]:
    """The results (--junitxml) and the output of a run of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.xml"
        out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}", *arguments)
        return ElementTree.parse(path).getroot(), out


def counts(results: ElementTree.Element) -> Result:
    """How many tests there were, and how many of them were skipped, each with its reason."""
    tests = list(results.iter("testcase"))
    skipped = [node.get("message", "") for node in results.iter("skipped")]
    return {"tests": len(tests), "skipped": len(skipped), "reasons": sorted(set(skipped))}


def cases() -> Result:
    """The field cases: how many tests settle each."""
    results, _ = pytest("tests/field", "-m", "case")
    found: dict[str, int] = {}
    for test in results.iter("testcase"):
        if test.find("skipped") is None:
            for node in test.iter("property"):
                if node.get("name") == "case":
                    found[node.get("value", "")] = found.get(node.get("value", ""), 0) + 1
    return {**counts(results), "cases": dict(sorted(found.items()))}


def properties() -> Result:
    """Random blocks, and forwards of random calls."""
    examples = {}
    for name in ("block", "fuse"):
        path = f"tests/test_{name}_properties.py"
        _, out = pytest(path, "--hypothesis-profile=soak", "--hypothesis-show-statistics")
        examples[name] = sum(map(int, re.findall(r"(\d+) passing", out)))
    return {"examples": examples}


def fuzz() -> Result:
    """Native ops under sanitizers."""
    runs = []
    for seed, isa in enumerate(ISAS):
        command = [str(HERE / "fuzz_native.py"), "--sanitize", "--calls", str(FUZZ_CALLS), "--seed", str(seed)]
        runs.append({"isa": isa or "best", **json.loads(run(*command, **({"FUSEDRES_CPU_ISA": isa} if isa else {})))})
    return {"runs": runs}


def memory() -> Result:
    """Steps and calls with the memory sampled."""
    return json.loads(run(str(HERE / "memory.py")))


def bad_input() -> Result:
    """What the command line, the public functions and the modules refuse."""
    return counts(pytest("tests/test_cli_bad_input.py", "tests/field/test_field_bad_arguments.py")[0])


def concurrency() -> Result:
    """Threads and processes."""
    return counts(pytest("tests/test_concurrency.py")[0])


def faults() -> Result:
    """Planted faults, and whether they are seen."""
    return json.loads(run(str(HERE / "planted.py")))


PARTS: dict[str, Callable[[], Result]] = {
    part.__name__: part for part in (cases, properties, fuzz, memory, bad_input, concurrency, faults)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--report", action="store_true", help="write the document alone")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part is named {', '.join(unknown)}; there are {', '.join(PARTS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = False
    for name in [] if args.report else args.parts or PARTS:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            found = PARTS[name]()
        except PartFailed as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        results[name] = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "commit": environment.commit(),
            "torch": environment.versions()["torch"],
            "cpu": environment.machine()["cpu"],
            "seconds": round(time.perf_counter() - start),
            **found,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report.write(results)
    return failed


if __name__ == "__main__":
    sys.exit(main())
