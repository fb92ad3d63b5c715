"""Field cases of bad arguments: each raises what eager raises, names what is wrong, and moves no statistics."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import bad_calls
import pytest
import torch
from oracles import ENGINES

import fusedres

ROOT = Path(fusedres.__file__).parent.parent
BLOCKS = ("basic", "bottleneck", "grouped", "layer", "conv_bn_relu")
MESSAGES = {fault: message for fault, (_, message) in (bad_calls.INPUTS | bad_calls.STATES).items()}
MESSAGES |= {"no conv": "None", "no norm": "None|weight", "a BN for another number of channels": r"\(5,\)"}


@cache
def outcomes(engine: str) -> tuple[int, list[list[str]]]:
    """The exit code of a process that made every bad call, and (model, fault, outcome) of each."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, bad_calls.__file__, engine], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, [line.split("\t") for line in done.stdout.splitlines()]


@pytest.mark.case("F37")
@pytest.mark.parametrize("engine_name", ENGINES)
def test_no_bad_call_ends_the_process(engine_name: str) -> None:
    code, rows = outcomes(engine_name)
    assert code == 0, f"exit code {code} after {rows[-1] if rows else 'nothing'}"
    assert {fault for _, fault, _ in rows} == set(MESSAGES)


@pytest.mark.case("F37")
@pytest.mark.parametrize("fault", MESSAGES)
@pytest.mark.parametrize("engine_name", ENGINES)
def test_bad_call_raises_and_names_what_is_wrong(fault: str, engine_name: str) -> None:
    _, rows = outcomes(engine_name)
    found = [(model, outcome) for model, of, outcome in rows if of == fault]
    assert found
    for model, outcome in found:
        assert re.match(f"(RuntimeError|ValueError|TypeError): .*({MESSAGES[fault]})", outcome), (model, outcome)
        # Of a network the layers in front have counted the batch already, in eager too.
        assert model not in BLOCKS or "statistics moved" not in outcome, (model, outcome)


@pytest.mark.case("F37")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_input_meets_cuda_weights_with_an_error_that_names_both() -> None:
    with pytest.raises(RuntimeError, match=r"cpu.*cuda"):
        fusedres.FusedBottleneck(64, 16).cuda()(torch.randn(2, 64, 5, 5))


#: Public constructors and functions with arguments that cannot be.
CONSTRUCTIONS = {
    "block": (lambda: fusedres.FusedBasicBlock(8, 8, groups=2), ValueError),
    "block, dilated": (lambda: fusedres.FusedBasicBlock(8, 8, dilation=2), NotImplementedError),
    "block, memory": (lambda: fusedres.FusedBottleneck(8, 2, memory="little"), ValueError),
    "layer, kernel": (lambda: fusedres.FusedConvBNReLU(4, 4, (3, 3, 3)), ValueError),
    "layer, kernel of text": (lambda: fusedres.FusedConvBNReLU(4, 4, "3"), ValueError),
    "layer, no kernel": (lambda: fusedres.FusedConvBNReLU(4, 4, None), ValueError),
    "layer, empty kernel": (lambda: fusedres.FusedConvBNReLU(4, 4, ()), ValueError),
    "layer, memory": (lambda: fusedres.FusedConvBNReLU(4, 4, memory="little"), ValueError),
    "layer, groups": (lambda: fusedres.FusedConvBNReLU(4, 4, groups=3), ValueError),
    "network, layers": (lambda: fusedres.ResNet(fusedres.FusedBasicBlock, [1, 1]), ValueError),
    "network, dilation": (
        lambda: fusedres.ResNet(fusedres.FusedBottleneck, [1] * 4, replace_stride_with_dilation=[True]),
        ValueError,
    ),
    "network, keyword": (lambda: fusedres.resnet18(width=3), TypeError),
    "network, groups": (lambda: fusedres.resnext50_32x4d(groups=2), ValueError),
    "network, weights": (lambda: fusedres.resnet18(weights="nothing"), ValueError),
    "network, missing file": (lambda: fusedres.resnet18(weights="nothing.pth"), FileNotFoundError),
    "small network, weights": (lambda: fusedres.cifar_resnet20(weights="DEFAULT"), ValueError),
    "small network, shortcut": (lambda: fusedres.cifar_resnet20(shortcut="C"), ValueError),
    "small network, n": (lambda: fusedres.CifarResNet(0), ValueError),
    "small plain network, n": (lambda: fusedres.CifarPlainNet(-1), ValueError),
    "engine": (lambda: fusedres.engine("abacus").__enter__(), ValueError),
    "explain": (lambda: fusedres.explain("resnet18"), TypeError),
    "explain, None": (lambda: fusedres.explain(None), TypeError),
    "freeze": (lambda: fusedres.freeze("resnet18"), TypeError),
    "freeze, a tensor": (lambda: fusedres.freeze(torch.ones(1)), TypeError),
}


@pytest.mark.case("F37")
@pytest.mark.parametrize("what", CONSTRUCTIONS)
def test_public_functions_refuse_arguments_that_cannot_be(what: str) -> None:
    call, error = CONSTRUCTIONS[what]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value)
