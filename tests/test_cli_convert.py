"""``fusedres convert``: one set of numbers before and after, as safetensors and as ONNX, and one line for misfits."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_cli import assert_one_line
from torch import Tensor, nn
from torchvision import models
from trained_nets import ARCH, CLASSES, checkpoint, picture, small_net

import fusedres
from fusedres import artefact, cli
from fusedres.card import FOLDED, Card
from fusedres.cli import networks, trained
from fusedres.resnet import StagedNet

SIZE = 64

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript", "ignore::FutureWarning:onnxscript")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    pytest.importorskip("safetensors", reason="needs safetensors")
    monkeypatch.chdir(tmp_path)


def convert(*arguments: str, checkpoint: str = "net.pth", arch: str = ARCH) -> int:
    return cli.main(["convert", checkpoint, "--arch", arch, "--image-size", str(SIZE), *arguments])


def batch(count: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def assert_as_near_as_eager(found: Tensor, eager: nn.Module, x: Tensor) -> None:
    """At most twice the error of eager's worse layout against float64."""
    formats = torch.contiguous_format, torch.channels_last
    with torch.no_grad():
        own = [eager.to(memory_format=layout)(x.to(memory_format=layout)) for layout in formats]
        exact = copy.deepcopy(eager).double()(x.double())
    bound = 2 * max(error(y, exact) for y in own) + torch.finfo(torch.float32).eps
    assert error(found, exact) <= bound


def eager_of(net: nn.Module, arch: str = ARCH) -> nn.Module:
    return networks.eager_twin(arch, net)[0].eval()


# Folding


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet50", "resnext50_32x4d", "plain18", "cifar_resnet20", "cifar_plain20"]
)
def test_folded_network_has_the_numbers_and_the_fused_convs(arch: str) -> None:
    net, x = small_net(arch), batch(2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    eager, folded = eager_of(net, arch), artefact.fold(net)
    bare = artefact.without_norms(folded)
    with torch.no_grad():
        assert_as_near_as_eager(folded(x), eager, x)
        assert_as_near_as_eager(bare(x), eager, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in bare.modules())
    explanation = fusedres.explain(folded)
    assert explanation.fused == explanation.convs > 0
    assert not any("bn" in name or "running" in name for name in artefact.state(folded))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_folding_in_float64_is_exact_to_half_the_digits() -> None:
    net, x = small_net().double(), batch(2).double()
    with torch.no_grad():
        assert error(artefact.fold(net)(x), net(x)) < 1e-12


def test_own_network_with_conv_biases_folds_them_in() -> None:
    net: StagedNet = small_net()
    net.conv1.bias = nn.Parameter(torch.randn(64))
    x = batch(2)
    with torch.no_grad():
        assert error(artefact.fold(net)(x), net(x)) < 1e-5


# The artefact


def test_artefact_predicts_what_the_checkpoint_does() -> None:
    checkpoint(Path("net.pth"))
    names = ["a.png", "b.png"]
    for seed, name in enumerate(names):
        picture(Path(name), seed=seed)
    assert convert("--to", "out/net.safetensors") == 0
    found = {}
    options = {"net.pth": ["--arch", ARCH, "--image-size", str(SIZE)], "out/net.safetensors": []}
    for weights, more in options.items():
        assert cli.main(["predict", *names, "--weights", weights, "--json", "out.json", *more]) == 0
        found[weights] = json.loads(Path("out.json").read_text())
    assert [record["arch"] for record in found.values()] == [ARCH, ARCH]
    for one, other in zip(*(record["pictures"] for record in found.values()), strict=True):
        assert [guess["class"] for guess in one["top"]] == [guess["class"] for guess in other["top"]]
        for a, b in zip(one["top"], other["top"], strict=True):
            assert a["probability"] == pytest.approx(b["probability"], rel=1e-3)


def test_artefact_says_what_it_is_and_holds_no_bn() -> None:
    safetensors = pytest.importorskip("safetensors", reason="needs safetensors")
    net = checkpoint(Path("net.pth"))
    assert convert("--to", "net.safetensors") == 0
    with safetensors.safe_open("net.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert (metadata["arch"], metadata["version"]) == (ARCH, fusedres.__version__)
    assert json.loads(metadata["preprocessing"])["crop"] == SIZE
    convs = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert names == {f"{name}.{kind}" for name in (*convs, "fc") for kind in ("weight", "bias")}
    network = trained.load("net.safetensors", None)
    assert network.preprocessing.crop == SIZE
    assert network.labels == list(map(str, range(CLASSES)))


@pytest.mark.parametrize(
    ("library", "wrap"),
    [
        ("torchvision", lambda state: state),
        ("torchvision", lambda state: {"model": state}),
        ("timm", lambda state: {"state_dict": state, "epoch": 3}),
    ],
    ids=["torchvision", "torchvision in model", "timm in state_dict"],
)
def test_checkpoint_of_another_library(library: str, wrap: Callable) -> None:
    torch.manual_seed(1)
    if library == "torchvision":
        eager = models.resnet18(num_classes=CLASSES)
    else:
        timm = pytest.importorskip("timm", reason="needs timm")
        eager = timm.create_model("resnet18", num_classes=CLASSES)
    networks.shake(eager)
    torch.save(wrap({f"module.{name}": tensor for name, tensor in eager.state_dict().items()}), "net.pth")
    assert convert("--to", "net.safetensors") == 0
    x = batch(2)
    with torch.no_grad():
        assert_as_near_as_eager(trained.load("net.safetensors", None).model(x), eager.eval(), x)


def test_constructor_given_an_artefact_says_what_to_use() -> None:
    checkpoint(Path("net.pth"))
    assert convert("--to", "net.safetensors") == 0
    with pytest.raises(
        RuntimeError, match=r"net\.safetensors does not fit ResNet: it was folded .* `fusedres predict`"
    ):
        fusedres.resnet18(weights="net.safetensors", num_classes=CLASSES)


def test_checkpoint_without_counters_of_batches_is_whole() -> None:
    state = {name: t for name, t in small_net().state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(dict(state), "net.pth")
    assert convert("--to", "net.safetensors") == 0


# ONNX


def test_onnx_has_the_numbers_for_any_batch_and_standard_nodes_without_bn() -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    net = checkpoint(Path("net.pth"))
    assert convert("--to", "net.safetensors") == 0
    assert convert("--onnx", "net.onnx", checkpoint="net.safetensors") == 0
    model = onnx.load("net.onnx")
    onnx.checker.check_model(model, full_check=True)
    nodes = {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert "Conv" in nodes
    assert "BatchNormalization" not in nodes
    assert {entry.key: entry.value for entry in model.metadata_props}["arch"] == ARCH
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = batch(count)
        (found,) = session.run(["logits"], {"pictures": x.numpy()})
        assert_as_near_as_eager(torch.from_numpy(found), eager_of(net), x)


# Errors of the user


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--to", "--onnx"]),
        (["--to", "net.pth"], [".safetensors"]),
        (["--onnx", "net.pb"], [".onnx"]),
        (["--to", "/dev/null/net.safetensors"], ["/dev/null/net.safetensors"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_error_of_the_user(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert_one_line(convert(*arguments), capsys.readouterr().err, *words)


def test_misfit_names_the_keys_and_leaves_the_old_file(capsys: pytest.CaptureFixture) -> None:
    state = small_net().state_dict()
    state["head.weight"] = state.pop("layer1.0.conv1.weight")
    state["conv1.weight"] = state["conv1.weight"][:, :, :3, :3].clone()
    torch.save(state, "net.pth")
    Path("net.safetensors").write_text("old")
    code = convert("--to", "net.safetensors")
    words = (
        "missing layer1.0.conv1.weight;",
        "unexpected head.weight;",
        "conv1.weight (64, 3, 3, 3) for (64, 3, 7, 7)",
    )
    assert_one_line(code, capsys.readouterr().err, "net.pth does not fit resnet18", *words)
    assert Path("net.safetensors").read_text() == "old"
    assert not list(Path().glob("*.partial"))


def test_failed_write_leaves_the_old_file(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    checkpoint(Path("net.pth"))
    Path("net.safetensors").write_text("old")
    monkeypatch.setattr("os.fsync", full)
    assert_one_line(convert("--to", "net.safetensors"), capsys.readouterr().err, "net.safetensors", "No space left")
    assert Path("net.safetensors").read_text() == "old"


def test_artefact_of_another_network_is_refused(capsys: pytest.CaptureFixture) -> None:
    checkpoint(Path("net.pth"))
    assert convert("--to", "net.safetensors") == 0
    code = cli.main(["predict", ".", "--weights", "net.safetensors", "--arch", "resnet50"])
    assert_one_line(code, capsys.readouterr().err, "no picture")
    picture(Path("a.png"))
    capsys.readouterr()
    code = cli.main(["predict", ".", "--weights", "net.safetensors", "--arch", "resnet50"])
    assert_one_line(code, capsys.readouterr().err, "resnet18, not resnet50")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("arch", "vgg16", "vgg16"),
        ("preprocessing", "{", "net.safetensors does not say"),
        ("preprocessing", "[]", "net.safetensors: TypeError"),
        ("preprocessing", "{}", "net.safetensors: KeyError: 'resize'"),
        (
            "preprocessing",
            '{"resize": 0, "crop": 0, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"}',
            "no way",
        ),
        (
            "preprocessing",
            '{"resize": 9, "crop": 9, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "magic"}',
            "magic",
        ),
    ],
)
def test_damaged_card_is_told(key: str, value: str, word: str, capsys: pytest.CaptureFixture) -> None:
    save = pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file
    net = small_net("cifar_resnet20")
    card = Card("cifar_resnet20", {}, FOLDED)
    save(artefact.state(artefact.fold(net)), "net.safetensors", card.metadata() | {key: value})
    picture(Path("a.png"))
    assert_one_line(cli.main(["predict", "a.png", "--weights", "net.safetensors"]), capsys.readouterr().err, word)


@pytest.mark.parametrize("missing", ["safetensors", "onnx", "onnxscript"])
def test_missing_package_is_named_with_its_extra(
    missing: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    output = ["--to", "a.safetensors"] if missing == "safetensors" else ["--onnx", "a.onnx"]
    if missing == "onnxscript":
        pytest.importorskip("onnx", reason="needs onnx")
    assert_one_line(convert(*output), capsys.readouterr().err, f"needs {missing}", "fusedres[deploy]")
