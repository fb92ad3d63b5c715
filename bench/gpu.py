"""ResNets on the GPU: fused against eager channels_last and torch.compile, in training and eval, as JSON.

    python bench/gpu.py [--batch 256] [--arch resnet50] [--rounds 20] [--out bench/results]

Contestants take turns within one run; figures are medians of wall time around a synchronised step. A training step is
zero_grad, forward under autocast, cross_entropy and backward, without optimizer. The result goes to
``<out>/<gpu-name>/``. Exit code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contest import pair
from torch import Tensor, nn

import fusedres
from fusedres import dispatch
from fusedres.cli import environment
from fusedres.measure import interleaved, medians

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
#: More inputs than the L2 cache of any GPU here holds, taken in turn.
INPUTS = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="time torch.compile(mode='max-autotune') of eager too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def contestants(args: argparse.Namespace) -> dict[str, nn.Module]:
    """eager and fused with the same state, channels_last on the GPU; of eager a compiled copy where asked for."""
    import torchvision

    eager, fused = (getattr(family, args.arch)() for family in (torchvision.models, fusedres))
    models = {k: m.cuda().to(memory_format=torch.channels_last) for k, m in pair(eager, fused).items()}
    if args.compile:
        models["compiled"] = torch.compile(copy.deepcopy(models["eager"]), mode="max-autotune")
    return models


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


def measure(models: dict[str, nn.Module], args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    size = (args.batch, 3, args.side, args.side)
    inputs = [torch.randn(size, device="cuda").to(memory_format=torch.channels_last) for _ in range(INPUTS)]
    labels = torch.randint(1000, (args.batch,), device="cuda")
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
        samples = interleaved(steps, args.rounds, "cuda", warmup=5)
        seconds = medians(samples)
        found[mode] = {
            "seconds": seconds,
            "images_per_second": {name: args.batch / s for name, s in seconds.items()},
            "speedup_over_eager": seconds["eager"] / seconds["fused"],
            "samples": samples,
        }
        print(f"{args.arch} {dtype} {mode}: { ({k: f'{1e3 * s:.2f} ms' for k, s in seconds.items()}) }", flush=True)
    return found


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
        "machine": environment.machine(),
        "versions": environment.versions() | {"commit": environment.commit(), "cudnn": torch.backends.cudnn.version()},
        "clock": "time.perf_counter around torch.accelerator.synchronize",
        "engines": {name: dispatch.choose("conv_fprop", "cuda", dtype).engine.name for name, dtype in DTYPES.items()},
    }
    results = facts | {name: measure(models, args, dtype) for name, dtype in DTYPES.items()}
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = args.out / name / f"{args.arch}-batch{args.batch}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
