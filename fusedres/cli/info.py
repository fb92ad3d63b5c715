"""``fusedres info``: what is installed, which engines run here, and why another does not."""

from __future__ import annotations

import argparse
import json

from fusedres.cli import console, environment

HELP = "versions, engines and why one is missing, GPUs, threads, instruction set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the facts. Returns the exit code."""
    facts: dict[str, dict] = {
        "versions": environment.versions() | {"commit": environment.commit()},
        "machine": environment.machine(),
        "engines": environment.engines(),
        "native": environment.native_library(),
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    console.table("versions", ("package", "version"), [(k, v or "-") for k, v in facts["versions"].items()])
    console.table("machine", ("what", "value"), [(k, _text(v)) for k, v in facts["machine"].items()])
    engines = [(name, "no" if why else "yes", why or "") for name, why in facts["engines"].items()]
    console.table("engines, the preferred first", ("engine", "usable", "why not"), engines)
    console.table("native library", ("what", "value"), [(k, _text(v)) for k, v in facts["native"].items() if v])
    return 0


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
