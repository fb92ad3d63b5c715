"""Choices that ``autotune`` made, kept from process to process: a JSON file each, in a folder of the user's cache.

The folder is ``tuning`` in FUSEDRES_CACHE_DIR, else in ``fusedres`` of XDG_CACHE_HOME or ~/.cache; in it is one for
each environment (GPU, its capability, versions of torch, CUDA, cuDNN and Triton). A file is written aside and renamed,
so that readers see the old or the new one whole, and processes that choose at once lose none of each other's choices.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fusedres.problem import ConvProblem, as_pair

_FORMAT = 1

#: What a choice depends on beside the call itself: names and versions.
Environment = dict[str, str]


class Choice(NamedTuple):
    """What was chosen for an op on a problem, and the median seconds of all that took part.

    ``call``: the operands and flags, by which the choice is found.
    """

    op: str
    call: str
    problem: ConvProblem
    dtype: str
    chosen: str
    seconds: dict[str, float]


def folder_of(environment: Environment) -> Path:
    """Where the choices made in ``environment`` lie."""
    root = os.environ.get("FUSEDRES_CACHE_DIR")
    if not root:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        root = os.path.join(cache, "fusedres")
    name = re.sub(r"\W+", "-", environment["gpu"]).strip("-").lower()
    return Path(root) / "tuning" / f"{name}-{_digest(json.dumps(environment, sort_keys=True))}"


def read(environment: Environment, call: str) -> Choice | None:
    """The choice kept for ``call``; None where there is none, with a warning where there is something else."""
    found = _load(_path(environment, call), environment)
    return found if found is not None and found.call == call else None


def read_all(environment: Environment) -> Iterator[Choice]:
    """Every choice kept for ``environment``."""
    for path in sorted(folder_of(environment).glob("*.json")):
        found = _load(path, environment)
        if found is not None:
            yield found


def write(environment: Environment, choice: Choice) -> None:
    """Keep ``choice``. A folder that cannot be written to is a warning: the choice holds in this process then."""
    path = _path(environment, choice.call)
    content = {"format": _FORMAT, "environment": environment, **choice._asdict(), "problem": vars(choice.problem)}
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
            aside = file.name
            json.dump(content, file, indent=1)
        os.replace(aside, path)
    except OSError as error:
        warnings.warn(f"what autotune chose is not kept: {error}", stacklevel=2)
        if aside is not None:
            Path(aside).unlink(missing_ok=True)


def _path(environment: Environment, call: str) -> Path:
    return folder_of(environment) / f"{_digest(call)}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _load(path: Path, environment: Environment) -> Choice | None:
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["environment"] != environment:
            raise ValueError("it is of another format or environment")
        return _parse(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{path} holds no choice of autotune and is ignored: {error!r}", stacklevel=2)
        return None


def _parse(content: dict[str, Any]) -> Choice:
    """The choice in a file's ``content``. ValueError, TypeError or KeyError for anything else."""
    op, call, dtype, chosen = (content[name] for name in ("op", "call", "dtype", "chosen"))
    if not all(isinstance(text, str) for text in (op, call, dtype, chosen)):
        raise ValueError("op, call, dtype and chosen are text")
    sizes: dict[str, Any] = {k: as_pair(v) if isinstance(v, list) else int(v) for k, v in content["problem"].items()}
    seconds = {str(label): float(median) for label, median in content["seconds"].items()}
    return Choice(op, call, ConvProblem(**sizes), dtype, chosen, seconds)
