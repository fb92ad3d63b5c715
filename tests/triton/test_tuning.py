"""Autotuning: what may be timed and when, what is chosen and kept, with a timer that says what the test wants."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_cases import assert_matches, dgrad_args, fprop_args, label, results, wgrad_args
from launches import launched
from op_samples import Operands
from oracles import batch, block_twins
from torch import Tensor, nn

import fusedres
from fusedres import FusedBottleneck, choices, measure, ops, reference, replay, tuning
from fusedres.engines import nvidia
from fusedres.engines.cudnn import CUDNN
from fusedres.engines.triton import TRITON, interpreted
from fusedres.kernels import configs
from fusedres.problem import ConvProblem

RAGGED = ConvProblem(2, 18, 6, 7, 21, 3, 3, padding=(1, 1))
PROBLEMS = [
    RAGGED,
    ConvProblem(2, 32, 6, 5, 48, 1, 1),
    ConvProblem(1, 16, 7, 6, 32, 3, 3, (2, 2), (1, 1)),
    ConvProblem(1, 3, 13, 11, 8, 7, 7, (2, 2), (3, 3)),
    ConvProblem(1, 32, 5, 5, 32, 3, 3, (1, 1), (1, 1), groups=8),
]
#: A tile that is a candidate for ``POINTWISE``, and not what the table has for it.
POINTWISE = ConvProblem(2, 32, 6, 5, 64, 1, 1)
TILE = configs.Tile(64, 64, 64, 4, 3)


class Timer:
    """Runs every candidate once and says that ``best`` is the fastest; the static choice stands first."""

    def __init__(self) -> None:
        self.best: str | None = None
        self.ratio = 0.5
        self.timed: list[Mapping[str, Callable[[], object]]] = []

    def serves(self, device: torch.device) -> bool:
        return True

    def seconds(self, calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
        assert not torch._C._len_torch_dispatch_stack()
        self.timed.append(dict(calls))
        return {name: self.ratio if name == self.best else 1.0 for name in calls}


@pytest.fixture(autouse=True)
def timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Timer]:
    timer = Timer()
    monkeypatch.setattr(tuning, "timer", timer)
    monkeypatch.setattr(tuning, "_decided", {})
    monkeypatch.setattr(replay, "_met", {})
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    with fusedres.engine("triton"):
        yield timer


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[configs.Tile]:
    """The tile of every ``conv_fprop_kernel`` that is launched."""
    seen: list[configs.Tile] = []

    def note(tile: configs.Tile) -> dict[str, int]:
        seen.append(tile)
        return real(tile)

    module = importlib.import_module("fusedres.kernels.conv_fprop")
    real = module.tile_constants
    monkeypatch.setattr(module, "tile_constants", note)
    return seen


def args_of(
    device: str, form: str = "bias+residual+relu", problem: ConvProblem = POINTWISE, dtype: torch.dtype = torch.float16
) -> list[Any]:
    args = fprop_args(Operands(dtype), problem, form)
    return [a.to(device) if isinstance(a, Tensor) else a for a in args]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def calls(make: Operands, problem: ConvProblem) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every op of the convs with all that it can be asked for."""
    for form in ("genstats", "prologue+bias+residual+relu+genstats", "residual"):
        yield "conv_fprop", fprop_args(make, problem, form)
    for form, epilogue in (("plain", "residual"), ("batch", "drelu"), ("constant", "strided")):
        yield "conv_dgrad", dgrad_args(make, problem, form, epilogue)
    yield "conv_wgrad", wgrad_args(make, problem, "batch", prologue=True)


CASES = [
    *((problem, dtype) for dtype in (torch.float32, torch.float16) for problem in PROBLEMS),
    (RAGGED, torch.bfloat16),
]


@pytest.mark.parametrize(("problem", "dtype"), CASES, ids=lambda v: label(v) if isinstance(v, ConvProblem) else str(v))
def test_every_candidate_is_as_accurate_as_the_reference(problem: ConvProblem, dtype: torch.dtype, device: str) -> None:
    for op, args in calls(Operands(dtype), problem):
        assert tuning._problem(op, args) == problem
        on_device = [a.to(device) if isinstance(a, Tensor) else a for a in args]
        static, candidates = tuning._candidates(op, TRITON, on_device, problem)
        assert {static, "vendor"} < set(candidates)
        assert len(candidates) >= 3
        for name, candidate in candidates.items():
            if name == "vendor" and op == "conv_fprop":  # its statistics are of another kernel, to rounding as good
                y, stats = results(candidate, args, device)
                if stats.numel():
                    exact = reference.channel_stats(y.double())
                    torch.testing.assert_close(stats.double(), exact, rtol=1e-5, atol=1e-5)
                args = (*args[:10], False)
            assert_matches(named(op, candidate), args, device, f"{op} {name}")


def named(op: str, candidate: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return candidate(*args)

    call.__name__ = op
    return call


def test_the_static_choice_is_what_the_engine_runs_by_itself(device: str, tiles: list[configs.Tile]) -> None:
    for engine, form, expected in (
        (TRITON, "genstats", None),
        (CUDNN, "genstats", "vendor"),
        (CUDNN, "bias+relu", None),
    ):
        args = args_of(device, form)
        tiles.clear()
        engine.conv_fprop(*args)
        static, _ = tuning._candidates("conv_fprop", engine, args, POINTWISE)
        assert static == (expected or str(tiles[0]))


#: Calls that tensor descriptors serve, and calls that they do not.
SERVED = {
    "1x1": ("conv_fprop", POINTWISE, "bias+residual+relu"),
    "3x3": ("conv_fprop", ConvProblem(2, 32, 6, 5, 64, 3, 3, padding=(1, 1)), "genstats"),
    "plain": ("conv_dgrad", ConvProblem(2, 64, 6, 5, 32, 1, 1), "residual"),
}
NOT_SERVED = {
    "prologue": ("conv_fprop", POINTWISE, "prologue"),
    "stride": ("conv_fprop", ConvProblem(2, 32, 6, 5, 64, 1, 1, (2, 2)), "bias"),
    "channels": ("conv_fprop", RAGGED, "bias"),
    "mask": ("conv_dgrad", POINTWISE, "drelu"),
}


def offered(op: str, problem: ConvProblem, form: str, device: str, dtype: torch.dtype = torch.float16) -> set[str]:
    """The candidates with descriptors."""
    make = Operands(dtype)
    args = fprop_args(make, problem, form) if op == "conv_fprop" else dgrad_args(make, problem, "plain", form)
    on_device = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    return {label for label in tuning._candidates(op, TRITON, on_device, problem)[1] if "descriptors" in label}


def test_descriptors_are_offered_where_they_serve(device: str) -> None:
    tiles = configs.machine(torch.device(device)).descriptors
    for op, problem, form in SERVED.values():
        assert offered(op, problem, form, device) <= set(map(str, tiles))
        assert bool(offered(op, problem, form, device)) == bool(tiles)
        assert not offered(op, problem, form, device, torch.float32)
    for op, problem, form in NOT_SERVED.values():
        assert not offered(op, problem, form, device)


@pytest.mark.parametrize("programs", [0, 1])
def test_a_tile_with_descriptors_may_win_and_is_kept(
    programs: int, device: str, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = offered(*SERVED["1x1"], device)
    if not labels:
        pytest.skip("needs tensor descriptors: compute capability 9.0")
    timer.best = min(label for label in labels if ("persistent" in label) == bool(programs))
    args = args_of(device)
    with fusedres.autotune():
        ops.conv_fprop(*args)
        for _ in range(2):
            monkeypatch.setattr(tuning, "_decided", {})  # as another process
            assert launched(lambda: ops.conv_fprop(*args)) == {"conv_descriptor_kernel": 1}
    assert len(timer.timed) == 1


def test_a_choice_kept_before_there_were_descriptors_is_followed(
    device: str, timer: Timer, tiles: list[configs.Tile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, timer.best = args_of(device), str(TILE)
    with fusedres.autotune():
        ops.conv_fprop(*args)
        (path,) = files(tmp_path)
        content = json.loads(path.read_text())
        assert content["chosen"] == "64x64x64, 4 warps, 3 stages"
        content["seconds"] = {label: s for label, s in content["seconds"].items() if "descriptors" not in label}
        path.write_text(json.dumps(content))
        monkeypatch.setattr(tuning, "_decided", {})
        tiles.clear()
        ops.conv_fprop(*args)
    assert tiles == [TILE]
    assert len(timer.timed) == 1


def test_scratch_is_like_the_operands_and_none_of_them(device: str, timer: Timer) -> None:
    args = args_of(device)
    args[0] = torch.randn(3, 33, 6, 5, device=device).half()[1:, 1:]  # neither channels_last nor aligned
    args[2] = args[2][:1].expand(64)
    with fusedres.autotune():
        ops.conv_fprop(*args)
    (timed,) = timer.timed
    own = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
    for call in timed.values():
        scratch = call.args  # type: ignore[attr-defined]
        assert len(scratch) == len(args)
        for mine, theirs in zip(scratch, args, strict=True):
            if not isinstance(theirs, Tensor):
                assert tuning._look(mine) == tuning._look(theirs)
                continue
            assert mine.untyped_storage().data_ptr() not in own
            assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
            assert mine.data_ptr() % 16 == theirs.data_ptr() % 16
            assert mine.float().std() > 0 or theirs.stride() == (0,)


def test_a_tensor_given_twice_is_one_in_scratch(device: str) -> None:
    args = list(dgrad_args(Operands(torch.float16), RAGGED, "batch", "nothing"))
    args[1] = args[0]
    scratch = tuning._scratch(args)
    assert scratch[0] is scratch[1]
    assert scratch[0] is not args[0]


def test_operands_and_random_numbers_stay_what_they_were(device: str, timer: Timer) -> None:
    args = args_of(device)
    before = [a.clone() for a in args if isinstance(a, Tensor)]
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    with fusedres.autotune():
        ops.conv_fprop(*args)
    assert timer.timed
    assert all(map(torch.equal, before, (a for a in args if isinstance(a, Tensor))))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert states[1] is None or torch.equal(torch.cuda.get_rng_state(), states[1])


def test_the_winner_serves_inside_and_the_table_outside(device: str, timer: Timer, tiles: list[configs.Tile]) -> None:
    args, timer.best = args_of(device), str(TILE)
    ops.conv_fprop(*args)
    (table,) = tiles
    assert table != TILE
    with fusedres.autotune():
        ops.conv_fprop(*args)
        assert len(timer.timed) == 1
        for _ in range(2):
            tiles.clear()
            ops.conv_fprop(*args)
            assert tiles == [TILE]
        with fusedres.autotune(False):
            tiles.clear()
            ops.conv_fprop(*args)
            assert tiles == [table]
    tiles.clear()
    ops.conv_fprop(*args)
    assert tiles == [table]
    assert len(timer.timed) == 1


@pytest.mark.parametrize("engine", ["triton", "cudnn"])
def test_the_vendor_may_win(engine: str, device: str, timer: Timer) -> None:
    args, timer.best = args_of(device), "vendor"
    with fusedres.engine(engine), fusedres.autotune():
        ops.conv_fprop(*args)
        assert launched(lambda: ops.conv_fprop(*args)) == {"scale_shift_add_relu_kernel": 1}


def test_what_is_hardly_faster_does_not_replace_the_static_choice(
    device: str, timer: Timer, tiles: list[configs.Tile]
) -> None:
    args, timer.best, timer.ratio = args_of(device), str(TILE), 0.99
    with fusedres.autotune():
        ops.conv_fprop(*args)
        tiles.clear()
        ops.conv_fprop(*args)
    assert len(tiles) == 1
    assert TILE not in tiles


def test_a_choice_is_kept_and_read_again(
    device: str, timer: Timer, tiles: list[configs.Tile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, timer.best = args_of(device), str(TILE)
    with fusedres.autotune():
        ops.conv_fprop(*args)
    (path,) = files(tmp_path)
    content = json.loads(path.read_text())
    assert content["chosen"] == str(TILE)
    assert content["seconds"][str(TILE)] == 0.5
    monkeypatch.setattr(tuning, "_decided", {})
    timer.best = None
    with fusedres.autotune():
        tiles.clear()
        ops.conv_fprop(*args)
    assert tiles == [TILE]
    assert len(timer.timed) == 1


#: Runs the op of ``args_of`` and prints which kernels are launched.
ANOTHER_PROCESS = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from launches import launched
from test_tuning import args_of
import torch
import fusedres
from fusedres import ops
torch.backends.cudnn.allow_tf32 = False
with fusedres.engine("triton"):
    print(dict(launched(lambda: ops.conv_fprop(*args_of({device!r})))))
"""


@pytest.mark.parametrize(("asked", "expected"), [("1", "scale_shift_add_relu_kernel"), ("0", "conv_fprop_kernel")])
def test_another_process_follows_the_choice_where_it_is_asked_to(
    asked: str, expected: str, device: str, timer: Timer
) -> None:
    timer.best = "vendor"
    with fusedres.autotune():
        ops.conv_fprop(*args_of(device))
    here = Path(__file__).parent
    code = ANOTHER_PROCESS.format(tests=str(here.parent), here=str(here), device=device)
    environment = {**os.environ, "FUSEDRES_AUTOTUNE": asked}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == f"{{'{expected}': 1}}", ran.stderr


def test_the_environment_variable_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FUSEDRES_AUTOTUNE", value)
        assert tuning.is_on() is expected
    with fusedres.autotune():
        assert tuning.is_on()
    assert not tuning.is_on()


def variations(device: str) -> dict[str, list[Any]]:
    """Calls that each need a choice of their own."""
    plain = args_of(device)
    offset = args_of(device)
    offset[0] = torch.cat([plain[0].permute(0, 2, 3, 1).flatten()[:1], plain[0].permute(0, 2, 3, 1).flatten()])[1:]
    offset[0] = offset[0].view(2, 6, 5, 32).permute(0, 3, 1, 2)
    strided = args_of(device, problem=ConvProblem(2, 32, 6, 5, 64, 1, 1, (2, 2)))
    nchw = args_of(device)
    nchw[0] = nchw[0].contiguous()
    return {
        "plain": plain,
        "offset": offset,
        "stride": strided,
        "layout": nchw,
        "batch": args_of(device, problem=ConvProblem(1, 32, 6, 5, 64, 1, 1)),
        "dtype": args_of(device, dtype=torch.float32),
        "relu": [*plain[:9], False, False],
        "genstats": [*plain[:10], True],
        "residual": [*plain[:3], None, *plain[4:]],
        "prologue": args_of(device, "prologue+bias+residual+relu"),
    }


def test_what_decides_a_time_separates_choices(device: str, timer: Timer, tmp_path: Path) -> None:
    with fusedres.autotune():
        for _ in range(2):
            for args in variations(device).values():
                ops.conv_fprop(*args)
    assert len(timer.timed) == len(files(tmp_path)) == len(variations(device))


@pytest.mark.parametrize("flag", ["allow_tf32", "benchmark", "deterministic"])
def test_flags_separate_choices(flag: str, device: str, timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    args = args_of(device, dtype=torch.float32)
    with fusedres.autotune():
        for value in (False, True, False, True):
            monkeypatch.setattr(torch.backends.cudnn, flag, value)
            ops.conv_fprop(*args)
    assert len(timer.timed) == 2


def test_environments_separate_choices(device: str, timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    args, here = args_of(device), tuning._environment(torch.device(device))
    assert set(here) == {"gpu", "capability", "torch", "cuda", "cudnn", "triton"}
    for other in ({}, {"gpu": "another"}, {"capability": "99"}, {"torch": "1"}, {"triton": "1"}, {"cudnn": "1"}):
        monkeypatch.setattr(tuning, "_environment", lambda device, other=other: {**here, **other})
        for _ in range(2):
            monkeypatch.setattr(tuning, "_decided", {})
            with fusedres.autotune():
                ops.conv_fprop(*args)
    assert len(timer.timed) == 6


def test_gradients_with_constants_and_with_batch_statistics_are_told_apart(device: str, timer: Timer) -> None:
    for form in ("constant", "batch", "batch"):
        args = wgrad_args(Operands(torch.float16), RAGGED, form, prologue=False)
        with fusedres.autotune():
            ops.conv_wgrad(*(a.to(device) if isinstance(a, Tensor) else a for a in args))
    assert len(timer.timed) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\0\xff" * 9,
        lambda text: "[1, 2]",
        lambda text: text.replace('"chosen": "', '"picked": "'),
        lambda text: json.dumps({**json.loads(text), "chosen": 3}),
        lambda text: json.dumps({**json.loads(text), "problem": {"N": 1}}),
        lambda text: json.dumps({**json.loads(text), "environment": {"gpu": "another"}}),
        lambda text: json.dumps({**json.loads(text), "format": 0}),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning_and_replaced(
    damage: Callable[[str], str], device: str, timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, timer.best = args_of(device), str(TILE)
    with fusedres.autotune():
        ops.conv_fprop(*args)
        (path,) = files(tmp_path)
        whole = path.read_text()
        path.write_text(damage(whole))
        monkeypatch.setattr(tuning, "_decided", {})
        with pytest.warns(UserWarning, match="holds no choice of autotune"):
            ops.conv_fprop(*args)
    assert len(timer.timed) == 2
    assert path.read_text() == whole


def test_a_choice_that_is_no_candidate_any_more_is_made_anew(
    device: str, timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = args_of(device)
    with fusedres.autotune():
        ops.conv_fprop(*args)
        (path,) = files(tmp_path)
        path.write_text(json.dumps({**json.loads(path.read_text()), "chosen": "1x1x1"}))
        monkeypatch.setattr(tuning, "_decided", {})
        ops.conv_fprop(*args)
    assert len(timer.timed) == 2


def test_a_cache_that_cannot_be_written_to_is_a_warning(
    device: str, timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path / "file"))
    args, timer.best = args_of(device), "vendor"
    with fusedres.autotune():
        with pytest.warns(UserWarning, match="is not kept|holds no choice"):
            ops.conv_fprop(*args)
        assert "conv_fprop_kernel" not in launched(lambda: ops.conv_fprop(*args))
    assert len(timer.timed) == 1


def test_what_does_not_run_here_is_no_candidate(device: str, timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise MemoryError("out of shared memory")

    monkeypatch.setitem(tuning.VENDOR, "conv_fprop", fails)
    with fusedres.autotune():
        ops.conv_fprop(*args_of(device))
    (timed,) = timer.timed
    assert "vendor" not in timed
    assert len(timed) > 2


def test_no_memory_for_scratch_leaves_the_static_choice(
    device: str, timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tuning, "_scratch", fails)
    args = args_of(device)
    expected = ops.conv_fprop(*args)[0]
    with fusedres.autotune():
        with pytest.warns(UserWarning, match="keeps the static choice: no memory"):
            assert torch.equal(ops.conv_fprop(*args)[0], expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.conv_fprop(*args)
    assert not timer.timed
    assert not files(tmp_path)


def test_no_pixels_are_not_timed(device: str, timer: Timer) -> None:
    with fusedres.autotune():
        ops.conv_fprop(*args_of(device, problem=ConvProblem(0, 4, 5, 5, 6, 3, 3)))
    assert not timer.timed


def test_bad_operands_are_refused_as_ever(device: str, timer: Timer) -> None:
    args = args_of(device)
    args[2] = args[2][:-1]
    with fusedres.autotune(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="bias must be"):
            ops.conv_fprop(*args)


def test_nothing_is_timed_while_a_graph_is_captured(
    device: str, timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = args_of(device)
    with fusedres.autotune():
        with monkeypatch.context() as capture:
            capture.setattr(nvidia, "is_capturing", lambda device: True)
            with pytest.warns(UserWarning, match="while a CUDA graph is captured"):
                ops.conv_fprop(*args)
        assert not timer.timed
        assert not files(tmp_path)
        ops.conv_fprop(*args)
        assert len(timer.timed) == 1
        monkeypatch.setattr(nvidia, "is_capturing", lambda device: True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.conv_fprop(*args)  # its choice is made


def test_who_counts_launches_does_not_see_those_that_are_timed(device: str, timer: Timer) -> None:
    args = args_of(device)
    with fusedres.autotune():
        counted = measure.count_launches(lambda: ops.conv_fprop(*args)[0])
    assert timer.timed
    assert counted.forward_ops == {"fusedres::conv_fprop": 1}


@pytest.mark.skipif(not interpreted(), reason="is about the interpreter")
def test_the_real_timer_does_not_serve_the_interpreter() -> None:
    real = tuning.EventTimer()
    assert not any(real.serves(torch.device(kind)) for kind in ("cpu", "cuda"))


@pytest.mark.skipif(not torch.cuda.is_available() or interpreted(), reason="needs a GPU")
def test_the_real_timer_orders_a_short_and_a_long_call() -> None:
    short, long = (torch.zeros(size, device="cuda") for size in (1 << 10, 1 << 28))
    times = tuning.EventTimer().seconds({"long": long.zero_, "short": short.zero_}, short.device)
    assert 0 < times["short"] < times["long"]


def block(device: str) -> nn.Module:
    return block_twins(FusedBottleneck, 16, 4)[0].half().to(device).train()


def images(device: str, seed: int = 0) -> Tensor:
    return batch(2, 16, 6, 6, dtype=torch.float16, seed=seed).to(device)


def step(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    y.float().sum().backward()
    return y.detach()


def test_a_step_is_timed_once_recorded_then_and_replayed_with_its_choices(device: str, timer: Timer) -> None:
    module, timer.best = block(device), "vendor"
    with fusedres.autotune():
        timed, ran = [], []
        for i in range(4):
            ran.append(launched(lambda i=i: step(module, images(device, i))))
            timed.append(len(timer.timed))
        assert timed == [9 - 1] * 4  # conv1 needs no gradient of its input
        assert all(met.program for met in replay._met.values())
        assert not {"conv_fprop_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel"} & set(ran[-1])


def test_programs_recorded_outside_are_not_run_inside(device: str, timer: Timer) -> None:
    module, timer.best = block(device), "vendor"
    for i in range(3):
        step(module, images(device, i))
    with fusedres.autotune():
        step(module, images(device))
        assert timer.timed
        assert "conv_fprop_kernel" not in launched(lambda: step(module, images(device)))
    assert launched(lambda: step(module, images(device)))["conv_fprop_kernel"] == 3


def test_a_call_whose_choices_are_still_to_be_made_is_not_recorded(
    device: str, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, timer.best = block(device), "vendor"
    with fusedres.autotune():
        with monkeypatch.context() as capture:
            capture.setattr(nvidia, "is_capturing", lambda device: True)
            with pytest.warns(UserWarning, match="while a CUDA graph is captured"):
                step(module, images(device))
        step(module, images(device))  # would be recorded
        assert not timer.timed
        assert not replay._met
        for _ in range(3):
            step(module, images(device))
        assert timer.timed
        assert all(met.program for met in replay._met.values())
        assert "conv_fprop_kernel" not in launched(lambda: step(module, images(device)))


def test_backward_chooses_as_its_forward_did(device: str, timer: Timer) -> None:
    module, x = block(device), images(device)
    with fusedres.autotune():
        y = module(x)
    forward = len(timer.timed)
    assert forward == 3
    y.float().sum().backward()
    assert len(timer.timed) == forward + 5
    y = module(x)
    with fusedres.autotune():
        y.float().sum().backward()
    assert len(timer.timed) == forward + 5


def test_tracing_times_nothing(device: str, timer: Timer) -> None:
    timed_by_then = []

    def backend(graph: Any, inputs: Any) -> Any:
        timed_by_then.append(len(timer.timed))
        return graph

    module, x = block(device).eval(), images(device)
    with fusedres.autotune(), torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(x)
    assert timed_by_then == [0]
    torch.compiler.reset()


def test_explain_tells_what_was_tuned(device: str, timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    module, timer.best = block(device), "vendor"
    with fusedres.autotune():
        step(module, images(device))
        for known in (tuning._decided, {}):
            monkeypatch.setattr(tuning, "_decided", known)
            (row,) = fusedres.explain(module)
            assert "tuned: conv_fprop of 2x16x6x6 to 4, 1x1, float16: vendor" in row.reason
            assert "tuned: conv_wgrad of 2x4x6x6 to 4, 3x3, float16: vendor" in row.reason
        (other,) = fusedres.explain(block_twins(FusedBottleneck, 16, 8)[0].to(device))
        assert "tuned: conv_fprop of 2x16" not in other.reason
    (row,) = fusedres.explain(module)
    assert "tuned" not in row.reason


def test_what_is_kept_names_the_problem(device: str, timer: Timer) -> None:
    with fusedres.autotune():
        ops.conv_fprop(*args_of(device))
    (choice,) = choices.read_all(tuning.environment(torch.device(device)))
    assert (choice.op, choice.problem, choice.dtype) == ("conv_fprop", POINTWISE, "float16")
