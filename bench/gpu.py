"""ResNets on the GPU: fused against eager channels_last and torch.compile, in training and eval, as JSON.

    python bench/gpu.py [--batch 256] [--arch resnet50] [--rounds 20] [--dtypes float16 bfloat16] [--compile]
                        [--serve 1 128] [--out bench/results]

Contestants take turns within one run; figures are medians of wall time around a synchronised step, launched op by op,
replayed as one CUDA graph ("<name> graph"), and in training by ``torch.cuda.make_graphed_callables`` ("<name>
graphed"), which captures forward and backward of the model alone. A training step is zero_grad, forward under autocast,
cross_entropy and backward, without optimizer. ``--serve``: batches of an eval in float16 weights, as a server runs it,
by every engine. ``--compile`` takes minutes and comes last.
The result goes to ``<out>/<gpu-name>/``. Exit code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contest import clock, pair
from contest import inference as forward
from torch import Tensor, nn

import fusedres
from fusedres import dispatch
from fusedres.cli import environment
from fusedres.measure import captured, interleaved, medians

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
#: More inputs than the L2 cache of any GPU here holds, taken in turn.
INPUTS = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES), help="of training and eval")
    parser.add_argument("--serve", nargs="*", type=int, default=[1, 128])
    parser.add_argument("--chained", action="store_true", help="in training, blocks of a stage share Functions")
    parser.add_argument("--compile", action="store_true", help="time torch.compile in training too, of both")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def contestants(args: argparse.Namespace) -> dict[str, nn.Module]:
    """eager and fused with the same state, channels_last on the GPU."""
    import torchvision

    eager, fused = (getattr(family, args.arch)() for family in (torchvision.models, fusedres))
    fused.set_chained_blocks(args.chained or None)
    return {k: m.cuda() for k, m in pair(eager, fused).items()}


def training_step(model: nn.Module, inputs: list[Tensor], labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    turns = itertools.cycle(inputs)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype):
            loss = F.cross_entropy(model(next(turns)), labels)
        loss.backward()

    return run


def inference(model: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> Callable[[], None]:
    turns = itertools.cycle(inputs)

    def run() -> None:
        with torch.inference_mode(), torch.autocast("cuda", dtype):
            model(next(turns))

    return run


def prove(models: dict[str, nn.Module], x: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Errors of the logits against float64, relative to the largest; the fused one is at most twice eager's."""
    x = x[:8]
    with torch.no_grad():
        exact = copy.deepcopy(models["eager"]).eval().double()(x.double())
        errors = {}
        for name in ("eager", "fused"):
            with torch.autocast("cuda", dtype):
                logits = models[name].eval()(x).double()
            errors[name] = ((logits - exact).abs().max() / exact.abs().max()).item()
    assert errors["fused"] <= 2 * errors["eager"] + torch.finfo(dtype).eps, errors
    return errors


def graphed(model: nn.Module, x: Tensor, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` whose forward and backward are CUDA graphs."""
    with torch.autocast("cuda", dtype, cache_enabled=False):
        return torch.cuda.make_graphed_callables(copy.deepcopy(model), (x,))


def data(args: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    size = (args.batch, 3, args.side, args.side)
    inputs = [torch.randn(size, device="cuda").to(memory_format=torch.channels_last) for _ in range(INPUTS)]
    return inputs, torch.randint(1000, (args.batch,), device="cuda")


def measure(models: dict[str, nn.Module], args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    inputs, labels = data(args)
    found: dict[str, Any] = {"errors": prove(models, inputs[0], dtype)}
    for mode in ("train", "eval"):
        is_training = mode == "train"
        for model in models.values():
            model.train(is_training)
        if not is_training:
            fusedres.freeze(models["fused"])
        steps = {
            name: training_step(m, inputs, labels, dtype) if is_training else inference(m, inputs, dtype)
            for name, m in models.items()
        }
        steps |= {f"{name} graph": captured(step) for name, step in steps.items()}
        if is_training:
            for name, model in models.items():
                steps[f"{name} graphed"] = training_step(graphed(model, inputs[0], dtype), inputs, labels, dtype)
        samples = interleaved(steps, args.rounds, "cuda", warmup=5)
        seconds = medians(samples)
        found[mode] = {
            "seconds": seconds,
            "images_per_second": {name: args.batch / s for name, s in seconds.items()},
            "speedup_over_eager": seconds["eager"] / seconds["fused"],
            "speedup_over_eager_as_graphs": seconds["eager graph"] / seconds["fused graph"],
            "samples": samples,
        }
        del steps
        print(f"{args.arch} {dtype} {mode}: {milliseconds(samples)}", flush=True)
    return found


def milliseconds(samples: dict[str, list[float]]) -> str:
    """The medians, to be read."""
    return ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in medians(samples).items())


def serve(models: dict[str, nn.Module], args: argparse.Namespace) -> dict[str, Any]:
    """Eval of float16 models as CUDA graphs, by batch: eager, fused, and fused by each GPU engine asked for by name."""
    found: dict[str, Any] = {}
    for batch in args.serve:
        size = (batch, 3, args.side, args.side)
        x = torch.randn(size, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
        steps = {"eager": captured(forward(models["eager"], x))}
        for engine in (None, "triton", "cuda"):
            with fusedres.engine(engine):
                name = "fused" if engine is None else f"fused by {engine}"
                steps[name] = captured(forward(models["fused"], x))
        samples = interleaved(steps, args.rounds, "cuda", warmup=5)
        found[str(batch)] = {"seconds": medians(samples), "samples": samples}
        print(f"{args.arch} eval of {batch}: {milliseconds(samples)}", flush=True)
    return found


#: What of torch.compile is timed.
COMPILED = (("fused", "reduce-overhead"), ("eager", "max-autotune"))


def compiled(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Training steps of compiled models against the fused one captured as a CUDA graph, and what compiling took."""
    inputs, labels = data(args)
    models = {name: model.train() for name, model in contestants(args).items()}
    graph = captured(training_step(models["fused"], inputs, labels, dtype))
    found: dict[str, Any] = {}
    for name, mode in COMPILED:
        step = training_step(torch.compile(models[name], mode=mode), inputs, labels, dtype)
        start = clock()
        step()
        seconds = clock() - start
        samples = interleaved({f"{name} compiled": step, "fused graph": graph}, args.rounds, "cuda", warmup=5)
        found[f"{name} {mode}"] = {"compilation": seconds, "seconds": medians(samples), "samples": samples}
        print(
            f"{args.arch} {dtype} train, {name} {mode} compiled in {seconds:.0f} s: {milliseconds(samples)}", flush=True
        )
        yield {"compiled": found}


def stages(models: dict[str, nn.Module], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.dtypes:
        yield {name: measure(models, args, DTYPES[name])}
    for model in models.values():
        fusedres.freeze(model.eval().half())
    yield {"serve": serve(models, args)}
    models.clear()
    if args.compile:
        yield from compiled(args, torch.float16)


def folder(root: Path) -> Path:
    """Where results of this GPU lie."""
    path = root / re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    models = contestants(args)
    facts = {
        "arch": args.arch,
        "batch": args.batch,
        "side": args.side,
        "rounds": args.rounds,
        "chained": args.chained,
        "machine": environment.machine(),
        "versions": environment.versions() | {"commit": environment.commit(), "cudnn": torch.backends.cudnn.version()},
        "clock": "time.perf_counter around torch.accelerator.synchronize",
        "engines": {name: dispatch.choose("conv_fprop", "cuda", dtype).engine.name for name, dtype in DTYPES.items()},
    }
    path = folder(args.out) / f"{args.arch}-batch{args.batch}{'-chained' * args.chained}.json"
    for found in stages(models, args):  # what was measured is kept if a later stage fails
        facts |= found
        path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
