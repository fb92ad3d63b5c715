"""``weights=``: torchvision's enums and their names, and checkpoint files as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights, ResNet50_Weights, resnet18

import fusedres


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return resnet18().state_dict()


def assert_holds(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("weights", [ResNet18_Weights.DEFAULT, "DEFAULT", "IMAGENET1K_V1"], ids=str)
def test_enum_or_its_name_loads_the_published_tensors(weights, state, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, *args, **kwargs: state)
    assert_holds(fusedres.resnet18(weights=weights), state)


def test_enum_of_another_model_is_refused() -> None:
    with pytest.raises(TypeError):
        fusedres.resnet18(weights=ResNet50_Weights.DEFAULT)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        fusedres.resnet18(weights="IMAGENET22K")


def test_number_of_classes_must_be_that_of_the_weights() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        fusedres.resnet18(weights="DEFAULT", num_classes=10)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoint_file_loads_as_training_scripts_save_it(wrapper, prefix: str, state, tmp_path: Path) -> None:
    checkpoint: dict = {prefix + name: tensor for name, tensor in state.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint if wrapper is None else {wrapper: checkpoint, "epoch": 3}, path)
    assert_holds(fusedres.resnet18(weights=str(path)), state)
    assert_holds(fusedres.resnet18(weights=path), state)


def test_file_that_does_not_fit_names_the_keys(state, tmp_path: Path) -> None:
    path = tmp_path / "partial.pth"
    torch.save({name: tensor for name, tensor in state.items() if name != "fc.bias"}, path)
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        fusedres.resnet18(weights=path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pth"
    torch.save({"state_dict": resnet18}, path)
    with pytest.raises(ValueError, match="weights_only"):
        fusedres.resnet18(weights=path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        fusedres.resnet18(weights=tmp_path / "absent.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["empty", "text", "half", "zip header"])
def test_damaged_file_is_named(kind: str, suffix: str, state, tmp_path: Path) -> None:
    path = tmp_path / f"damaged{suffix}"
    save = torch.save if suffix == ".pth" else pytest.importorskip("safetensors.torch").save_file
    save(state, path)
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "text": b"no checkpoint\n" * 9,
        "half": whole[: len(whole) // 2],
        "zip header": b"PK\x03\x04",
    }
    path.write_bytes(content[kind])
    with pytest.raises(ValueError, match=rf"damaged\{suffix} is no (readable )?checkpoint") as caught:
        fusedres.resnet18(weights=path)
    assert "\n" not in str(caught.value)
