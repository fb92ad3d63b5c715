"""Autotuning, by request alone: a conv problem met for the first time is timed with every candidate, the best is kept.

Candidates are tiles of the Triton kernel and the vendor's conv between passes of ours, on both engines that have them.
They run on scratch tensors of the call's shapes, strides, dtypes and alignments, filled by a generator of their own:
neither the caller's memory nor its random numbers are touched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedres import choices
from fusedres.choices import Choice, Environment
from fusedres.engines import Engine, nvidia
from fusedres.engines.cudnn import CUDNN, VENDOR, prefers_triton
from fusedres.engines.triton import TRITON, interpreted
from fusedres.problem import ConvProblem

Call = Callable[..., Any]

#: The ops that have candidates.
OPS = tuple(VENDOR)
_VENDOR = "vendor"
#: A candidate is chosen where it takes less than this part of the static choice's time: else nothing is certain.
_MARGIN = 0.98
_ALIGNMENT = 16  # bytes of the widest access

_asked: ContextVar[bool | None] = ContextVar("fusedres_autotune", default=None)


@contextmanager
def autotune(enabled: bool = True) -> Iterator[None]:
    """Within this context (this thread, and the backward of what is computed here) choose convs by measurement.

    A conv problem that is met for the first time on a GPU is timed with several tiles and with the vendor's conv, the
    fastest serves it from then on, and the choice is kept for later processes (``fusedres.choices`` says where).
    FUSEDRES_AUTOTUNE=1 asks for it everywhere. Outside, nothing is timed and no kept choice is read: there the static
    table rules. A choice depends on the GPU, the versions of torch, CUDA, cuDNN and Triton, on op, shapes, strides and
    dtypes, and on torch.backends.cudnn's flags. It may change the last bits of a result, as another tile does.

    Nothing is timed while a CUDA graph is captured: run a step before.
    """
    token = _asked.set(enabled)
    try:
        yield
    finally:
        _asked.reset(token)


@torch.compiler.assume_constant_result
def is_on() -> bool:
    """Whether ``autotune`` or else FUSEDRES_AUTOTUNE asks for choices by measurement."""
    asked = _asked.get()
    return os.environ.get("FUSEDRES_AUTOTUNE", "0") not in ("", "0") if asked is None else asked


class Timer(Protocol):
    """How candidates are measured."""

    def serves(self, device: torch.device) -> bool:
        """Whether times on ``device`` mean anything."""

    def seconds(self, calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
        """The time of each call, all of which have run before."""


class EventTimer:
    """Medians of interleaved rounds by CUDA events. Before each call L2 is written over, so that operands come from
    memory, and the GPU sleeps for long enough that the call is queued whole when it begins."""

    _WARMUP, _ROUNDS = 2, 15
    _FLUSH_BYTES = 256 << 20  # more than any L2 holds
    _SLEEP_CYCLES = 1_000_000

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and not interpreted()

    def seconds(self, calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
        flush = torch.empty(self._FLUSH_BYTES, dtype=torch.uint8, device=device)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {label: [] for label in calls}
        for turn in range(-self._WARMUP, self._ROUNDS):
            for label, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                torch.cuda._sleep(self._SLEEP_CYCLES)
                start.record()
                call()
                end.record()
                if turn >= 0:
                    events[label].append((start, end))
        torch.cuda.synchronize(device)
        milliseconds = {k: statistics.median(a.elapsed_time(b) for a, b in pairs) for k, pairs in events.items()}
        return {label: ms * 1e-3 for label, ms in milliseconds.items()}


timer: Timer = EventTimer()


class Decision(NamedTuple):
    """What serves a call from now on; no choice where it was not timed and never will be."""

    run: Call
    choice: Choice | None


_decided: dict[Hashable, Decision] = {}
_lock = threading.Lock()


class _Undecided(threading.local):
    count = 0


_undecided = _Undecided()


def undecided() -> int:
    """How many calls of this thread ran by the static choice because nothing could be timed just then."""
    return _undecided.count


def fastest(op: str, engine: Engine, args: Sequence[Any]) -> Call:
    """What computes ``op`` of ``args`` fastest, as far as that is known; ``engine`` is the static choice."""
    key = op, args[0].device, *map(_look, args), *_flags()
    decision = _decided.get(key)
    if decision is None:
        decision = _decide(op, engine, args)
        if decision is None:
            return getattr(engine, op)
        _decided[key] = decision
    return decision.run


def made(device: torch.device) -> list[Choice]:
    """Every choice that ``autotune`` follows on ``device``: made in this process, or kept by another."""
    known = [d.choice for d in _decided.values() if d.choice is not None]
    kept = choices.read_all(environment(device)) if device.type in ("cpu", "cuda") else ()
    return list({choice.call: choice for choice in (*kept, *known)}.values())


def environment(device: torch.device) -> Environment:
    """What choices on ``device`` depend on beside the calls."""
    return dict(_environment(device))


@functools.cache
def _environment(device: torch.device) -> Environment:
    versions = {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "none",
    }
    if device.type != "cuda":
        return {"gpu": "interpreter", "capability": "none", **versions}
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {"gpu": torch.cuda.get_device_name(device), "capability": capability, **versions}


def _decide(op: str, engine: Engine, args: Sequence[Any]) -> Decision | None:
    """The decision for a call that has none in this process; None where it must wait."""
    problem, device = _problem(op, args), args[0].device
    static, candidates = _candidates(op, engine, args, problem)
    if problem.gemm_m * problem.gemm_k * problem.K == 0:
        return Decision(candidates[static], None)
    call = _text(op, args)
    kept = choices.read(environment(device), call)
    if kept is not None and kept.chosen in candidates:
        return Decision(candidates[kept.chosen], kept)
    if not timer.serves(device):
        return None
    if not _may_time(device):
        _undecided.count += 1
        return None
    with _lock, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kept = choices.read(environment(device), call)  # another thread or process may have been faster
        if kept is None or kept.chosen not in candidates:
            seconds = _time(candidates, args, static)
            if seconds is None:
                return Decision(candidates[static], None)
            best = min(seconds, key=lambda label: seconds[label])
            chosen = best if seconds[best] < _MARGIN * seconds[static] else static
            kept = Choice(op, call, problem, _name(args[0].dtype), chosen, seconds)
            choices.write(environment(device), kept)
    return Decision(candidates[kept.chosen], kept)


def _may_time(device: torch.device) -> bool:
    """Not while somebody else follows what is called: a CUDA graph, a compiler, or a recorder."""
    if nvidia.is_capturing(device):
        warnings.warn(
            "autotune times nothing while a CUDA graph is captured, and the graph keeps the static choice:"
            " run a step before",
            stacklevel=2,
        )
        return False
    return not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def _candidates(op: str, engine: Engine, args: Sequence[Any], problem: ConvProblem) -> tuple[str, dict[str, Call]]:
    """The label of the static choice, and every candidate by its label."""
    names = ("configs", "groups", "conv_descriptor")
    configs, groups, conv_descriptor = (importlib.import_module(f"fusedres.kernels.{name}") for name in names)
    size, kind = args[0].element_size(), groups.tile_class(op, problem)
    table = getattr(configs.machine(args[0].device), op.removeprefix("conv_"))
    first = configs.choose(table, size, *kind)
    described = conv_descriptor.candidates(op, problem, args)
    tiles = dict.fromkeys([first, *configs.candidates(size, *kind), *described])
    calls = {str(tile): _with_tile(op, tile) for tile in tiles}
    is_vendors = engine is CUDNN and not prefers_triton(op, args)
    return _VENDOR if is_vendors else str(first), {**calls, _VENDOR: VENDOR[op]}


def _with_tile(op: str, tile: Any) -> Call:
    trying = importlib.import_module("fusedres.kernels.configs").trying

    def call(*args: Any) -> Any:
        with trying(tile):
            return getattr(TRITON, op)(*args)

    return call


def _time(candidates: Mapping[str, Call], args: Sequence[Any], static: str) -> dict[str, float] | None:
    """The time of every candidate that runs at all; None, with a warning, where the static choice is not among them."""
    try:
        scratch = _scratch(args)
        works = {}
        for label, candidate in candidates.items():
            call = functools.partial(candidate, *scratch)
            if label == static or _runs(call):
                works[label] = call
        works[static]()
        return timer.seconds(works, args[0].device)
    except RuntimeError as error:  # most likely memory: the call itself may still have enough
        warnings.warn(f"autotune keeps the static choice: {str(error).splitlines()[0]}", stacklevel=2)
        return None


def _runs(call: Callable[[], object]) -> bool:
    """Whether a candidate compiles and launches here: some take more shared memory than there is."""
    try:
        call()
    except Exception:  # of Triton, of ptxas or of the vendor: they share no class
        return False
    return True


def _scratch(args: Sequence[Any]) -> list[Any]:
    """``args`` with memory of their own: a tensor given twice is one twice."""
    generator = torch.Generator(args[0].device).manual_seed(0)
    made: dict[Hashable, Tensor] = {}

    def like(t: Tensor) -> Tensor:
        key = t.data_ptr(), t.dtype, t.shape, t.stride()
        if key not in made:
            lead = t.data_ptr() % _ALIGNMENT // t.itemsize
            extent = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
            memory = torch.empty(lead + extent, dtype=t.dtype, device=t.device).normal_(generator=generator)
            made[key] = memory.as_strided(t.shape, t.stride(), lead)
        return made[key]

    return [like(arg) if isinstance(arg, Tensor) else arg for arg in args]


def _problem(op: str, args: Sequence[Any]) -> ConvProblem:
    """The conv of ``args``, which are those of the op in ``fusedres.ops``."""
    if op == "conv_fprop":
        x, w, *_ = args
        return ConvProblem.of(x, w, *args[5:9])
    if op == "conv_dgrad":
        g, w, input_size, groups = args[0], args[5], args[6], args[10]
        return ConvProblem.of(torch.Size((g.shape[0], w.shape[1] * groups, *input_size)), w, *args[7:11])
    g, x, kernel_size, groups = args[0], args[5], args[7], args[11]
    w_size = torch.Size((g.shape[1], x.shape[1] // groups, *kernel_size))
    return ConvProblem.of(x, w_size, *args[8:12])


def _flags() -> tuple[Hashable, ...]:
    """The settings that decide which of the vendor's convs runs, and in which precision."""
    cudnn = torch.backends.cudnn
    return (
        cudnn.enabled,
        cudnn.allow_tf32,
        cudnn.benchmark,
        cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
    )


def _look(arg: Any) -> Hashable:
    """What of an argument matters to its time; of a float (``inv_count``) whether it is 0."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.shape, arg.stride(), arg.data_ptr() % _ALIGNMENT
    if isinstance(arg, float):
        return arg != 0
    return tuple(arg) if isinstance(arg, Sequence) else arg


def _text(op: str, args: Sequence[Any]) -> str:
    """``_look`` at every argument and ``_flags``, in words."""

    def word(arg: Any) -> str:
        if not isinstance(arg, Tensor):
            return str(_look(arg))
        is_nhwc = arg.dim() == 4 and arg.is_contiguous(memory_format=torch.channels_last)
        layout = "nhwc" if is_nhwc else "dense" if arg.is_contiguous() else f"strides {list(arg.stride())}"
        offset = arg.data_ptr() % _ALIGNMENT
        return f"{_name(arg.dtype)}{list(arg.shape)} {layout}" + (f" at {offset}" if offset else "")

    return f"{op}({', '.join(map(word, args))}) with cudnn flags {_flags()}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
