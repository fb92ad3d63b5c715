"""``fusedres predict`` and ``fusedres evaluate``: right labels for any picture, one line for what is none."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_cli import assert_one_line
from torchvision import models
from trained_nets import ARCH, CLASSES, checkpoint, picture, small_net

from fusedres import cli
from fusedres.cli import photo
from fusedres.cli.common import UserError
from fusedres.cli.preprocessing import Preprocessing
from fusedres.training import open_data

SIZE = 32


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("saved") / "net.pth"
    return path, checkpoint(path)


@pytest.fixture
def net(saved: tuple[Path, torch.nn.Module]) -> torch.nn.Module:
    """The network in ``net.pth``."""
    path, model = saved
    Path("net.pth").symlink_to(path)
    return model


def predict(*arguments: str, weights: str = "net.pth", arch: str | None = ARCH) -> int:
    options = ["--weights", weights, "--image-size", str(SIZE), "--json", "out.json", "--engine", "reference"]
    return cli.main(["predict", *arguments, *options, *(["--arch", arch] if arch else [])])


def pictures() -> list[dict]:
    return json.loads(Path("out.json").read_text())["pictures"]


def expected(net: torch.nn.Module, *paths: str) -> torch.Tensor:
    """The probabilities by torchvision's own preprocessing and the modules of the network."""
    preset = models.ResNet18_Weights.IMAGENET1K_V1.transforms(crop_size=SIZE, resize_size=SIZE * 256 // 224)
    with torch.no_grad():
        return net(torch.stack([preset(Image.open(path)) for path in paths])).softmax(1)


# What it answers


def test_labels_and_probabilities_are_the_networks(net: torch.nn.Module, capsys: pytest.CaptureFixture) -> None:
    names = [f"{i}.png" for i in range(5)]
    for i, name in enumerate(names):
        picture(Path(name), seed=i)
    assert predict(*names, "--batch", "2", "--top", "3") == 0
    best = expected(net, *names).topk(3)
    assert [guess["file"] for guess in pictures()] == names
    for found, numbers, probabilities in zip(pictures(), best.indices, best.values, strict=True):
        assert [guess["class"] for guess in found["top"]] == numbers.tolist()
        assert [guess["label"] for guess in found["top"]] == list(map(str, numbers.tolist()))
        found_probabilities = torch.tensor([guess["probability"] for guess in found["top"]])
        torch.testing.assert_close(found_probabilities, probabilities, rtol=1e-4, atol=1e-6)
    out = capsys.readouterr().out
    assert f"{100 * float(best.values[4, 0]):.2f}%" in out
    assert "4.png" in out


def test_more_labels_than_classes_are_all_classes(net: torch.nn.Module) -> None:
    picture(Path("a.png"))
    assert predict("a.png", "--top", "100") == 0
    assert len(pictures()[0]["top"]) == CLASSES


def test_photo_has_labels_of_imagenet_by_a_network_of_1000_classes(capsys: pytest.CaptureFixture) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn: the photo comes with it")
    Image.fromarray(datasets.load_sample_image("china.jpg")).save("china.jpg")
    net = checkpoint(Path("net.pth"), classes=1000)
    assert predict("china.jpg") == 0
    best = expected(net, "china.jpg").topk(5).indices[0].tolist()
    names = models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert [guess["label"] for guess in pictures()[0]["top"]] == [names[i] for i in best]
    assert names[best[0]] in capsys.readouterr().out


def test_folders_stand_for_their_pictures_in_order(net: torch.nn.Module) -> None:
    Path("album/inner").mkdir(parents=True)
    for name in ("album/b.PNG", "album/a.jpg", "album/inner/c.webp", "z.bmp"):
        picture(Path(name))
    Path("album/notes.txt").write_text("no picture, and not asked for")
    assert predict("z.bmp", "album") == 0
    assert [guess["file"] for guess in pictures()] == ["z.bmp", "album/a.jpg", "album/b.PNG", "album/inner/c.webp"]


@pytest.mark.parametrize("kind", ["published member", "its file"])
def test_published_weights_bring_their_own_preprocessing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enum = models.ResNet50_Weights
    state = small_net("resnet50", classes=1000).state_dict()
    monkeypatch.setattr(enum, "get_state_dict", lambda self, *args, **kwargs: state)
    name = enum.IMAGENET1K_V2.url.rpartition("/")[2] if kind == "its file" else "ResNet50_Weights.IMAGENET1K_V2"
    if kind == "its file":
        torch.save(state, name)
    network = cli.trained.load(name, None)
    assert network.preprocessing == Preprocessing(232, 224)
    torch.testing.assert_close(network.model.state_dict(), state)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (17, 500), (30, 30)])
@pytest.mark.parametrize("member", ["IMAGENET1K_V1", "IMAGENET1K_V2"])
def test_preprocessing_is_torchvisions_to_the_bit(member: str, size: tuple[int, int]) -> None:
    weights = models.ResNet50_Weights[member]
    image = picture(Path("a.png"), size=size)
    assert torch.equal(Preprocessing.of(weights)(image), weights.transforms()(image))


def test_wrapped_checkpoint_and_safetensors_hold_the_same(net: torch.nn.Module) -> None:
    save_file = pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file
    picture(Path("a.png"))
    assert predict("a.png") == 0
    first = pictures()
    torch.save({"state_dict": {f"module.{name}": t for name, t in net.state_dict().items()}}, "wrapped.pth")
    save_file(net.state_dict(), "net.safetensors")
    for weights in ("wrapped.pth", "net.safetensors"):
        assert predict("a.png", weights=weights) == 0
        assert pictures() == first


def test_trained_network_sees_pictures_as_it_was_trained_to() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: the digits come with it")
    pytest.importorskip("safetensors", reason="needs safetensors")
    assert cli.main(["train", "--out", "run", "--image-size", "8", "--epochs", "3"]) == 0
    assert cli.main(["convert", "run/model.pt", "--to", "net.safetensors"]) == 0
    held_out = open_data("digits", 8).test.samples
    ink = held_out.pictures - held_out.pictures.min()  # blank paper becomes 0, the darkest ink 255
    for number, (image, label) in enumerate(zip(ink.div(ink.max()).mul(255).round(), held_out.labels, strict=True)):
        path = Path(f"digits/{label}/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy().astype(np.uint8)).save(path)
    trained = json.loads(Path("run/metrics.json").read_text())["epochs"][-1]["test_accuracy"]
    assert trained > 0.5
    for weights in ("run/model.pt", "run/checkpoint.pt", "net.safetensors"):
        assert cli.main(["evaluate", "--data", "imagefolder:digits", "--weights", weights, "--json", "out.json"]) == 0
        assert json.loads(Path("out.json").read_text())["top1"] == pytest.approx(trained, abs=1.5 / len(ink)), weights


# Pictures of every kind


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int64)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "tif")]
)
def test_every_mode_becomes_rgb(mode: str, suffix: str) -> None:
    picture(Path("rgb.png")).convert(mode).save(f"picture.{suffix}")
    opened = photo.open_rgb(f"picture.{suffix}")
    assert opened.mode == "RGB"
    assert np.array_equal(as_array(opened), as_array(Image.open(f"picture.{suffix}").convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = picture(Path("rgb.png")).convert("L")
    Image.fromarray((as_array(grey) * 257).astype(np.uint16)).save("picture.png")
    assert Image.open("picture.png").mode.startswith("I")
    assert np.array_equal(as_array(photo.open_rgb("picture.png")), as_array(grey.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_is_white(mode: str) -> None:
    image = picture(Path("rgb.png")).convert("L" if mode == "LA" else "RGB")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 20, image.height))
    image.putalpha(alpha)
    if mode == "PA":
        image = image.quantize()
    image.save("picture.png")
    pixels = as_array(photo.open_rgb("picture.png"))
    assert (pixels[:, :20] == 255).all()
    assert pixels[:, 20:].mean() < 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation: int) -> None:
    image = picture(Path("rgb.png"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save("turned.png", exif=exif)
    upright = photo.open_rgb("turned.png")
    assert upright.size == (image.size if orientation < 5 else image.size[::-1])
    assert np.array_equal(as_array(upright), as_array(ImageOps.exif_transpose(Image.open("turned.png"))))
    assert np.array_equal(as_array(upright), as_array(image)) == (orientation == 1)


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    image = picture(Path("rgb.png"))
    directory = "0002  0102 0002 00000006 00000026  0112 0003 00000001 0006 0000  00e90000"  # 0102 should be numbers
    exif = b"Exif\0\0MM\0*" + bytes.fromhex("00000008" + directory) + b"maker\0"
    image.save("picture.jpg", exif=exif)
    with pytest.raises(Exception, match="integer"):
        ImageOps.exif_transpose(Image.open("picture.jpg"))
    assert photo.open_rgb("picture.jpg").size == image.size


# Files that are no pictures


def damage(path: Path, kind: str) -> None:
    if kind == "truncated JPEG":
        picture(path, size=(300, 200))
        path.write_bytes(path.read_bytes()[:-800])
    elif kind == "truncated PNG":
        image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(image).save(path)
        path.write_bytes(path.read_bytes()[:50_000])
    elif kind == "text":
        path.write_text("I am no picture.\n" * 20)
    elif kind == "empty":
        path.touch()
    elif kind == "header alone":
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    elif kind == "folder without pictures":
        path.mkdir()
    elif kind == "too many pixels":
        path.write_bytes(b"P6 60000 60000 255\n" + bytes(1000))
    elif kind == "floats":
        Image.fromarray(np.zeros((9, 9), np.float32)).save(path)
    elif kind == "pipe":
        os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        ("a.jpg", "truncated JPEG", "truncated"),
        ("a.png", "truncated PNG", "truncated"),
        ("a.png", "text", "no picture"),
        ("a.png", "empty", "no picture"),
        ("a.png", "header alone", ""),
        ("a.png", "nothing", "No such file"),
        ("a", "folder without pictures", "no picture in the folder"),
        ("a.ppm", "too many pixels", "exceeds limit"),
        ("a.tif", "floats", "floating-point"),
        ("a.png", "pipe", "no file"),
    ],
)
def test_file_that_is_no_picture(
    name: str, kind: str, word: str, net: torch.nn.Module, capsys: pytest.CaptureFixture
) -> None:
    damage(Path(name), kind)
    assert_one_line(predict(name), capsys.readouterr().err, name, word)


def test_readable_pictures_are_answered_beside_others(net: torch.nn.Module, capsys: pytest.CaptureFixture) -> None:
    for name in ("a.png", "d.png"):
        picture(Path(name))
    damage(Path("b.jpg"), "truncated JPEG")
    damage(Path("c.png"), "text")
    code = predict("a.png", "b.jpg", "c.png", "d.png", "--batch", "1")
    out, err = capsys.readouterr()
    assert_one_line(code, err, "b.jpg", "and 1 other")
    assert "d.png" in out
    assert [guess["file"] for guess in pictures()] == ["a.png", "d.png"]
    first, second = json.loads(Path("out.json").read_text())["refused"]
    assert "b.jpg" in first
    assert "c.png" in second


def test_names_of_any_bytes_are_printed(net: torch.nn.Module, capfd: pytest.CaptureFixture) -> None:
    name = os.fsdecode(b"\xff\n.png")
    picture(Path(name))
    damage(Path("b\n.png"), "text")
    assert_one_line(predict(name, "b\n.png"), capfd.readouterr().err, "b .png", "no picture")
    assert pictures()[0]["file"] == name


def test_a_picture_named_twice_is_answered_twice(net: torch.nn.Module) -> None:
    picture(Path("a.png"))
    assert predict("a.png", "a.png") == 0
    assert len(pictures()) == 2


# Weights that are none


class Hostile:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_code_in_a_checkpoint_is_not_run(write, capsys: pytest.CaptureFixture) -> None:
    picture(Path("a.png"))
    with Path("hostile.pth").open("wb") as file:
        write({"state_dict": Hostile()}, file)
    reason = "it asks for code to be run" if write is torch.save else "it is not one of torch.save"
    assert_one_line(predict("a.png", weights="hostile.pth"), capsys.readouterr().err, "hostile.pth", reason)
    assert not Path("harmed").exists()


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
@pytest.mark.parametrize("kind", ["text", "empty", "half", "nothing", "folder", "list"])
def test_file_that_is_no_checkpoint(kind: str, name: str, capsys: pytest.CaptureFixture) -> None:
    picture(Path("a.png"))
    path = Path(name)
    if kind == "text":
        path.write_text("no checkpoint\n" * 9)
    elif kind == "empty":
        path.touch()
    elif kind == "half":
        if name.endswith("pth"):
            checkpoint(path)
        else:
            torch_file = pytest.importorskip("safetensors.torch", reason="needs safetensors")
            torch_file.save_file(small_net().state_dict(), name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "folder":
        path.mkdir()
    elif kind == "list":
        torch.save([torch.zeros(3)], name)
    assert_one_line(predict("a.png", weights=name), capsys.readouterr().err, name)


def test_weights_of_another_network_name_the_keys(net: torch.nn.Module, capsys: pytest.CaptureFixture) -> None:
    picture(Path("a.png"))
    code = predict("a.png", arch="resnet50")
    assert_one_line(
        code, capsys.readouterr().err, "net.pth does not fit resnet50", "missing layer1.0.conv3.weight", "more"
    )
    code = predict("a.png", arch="cifar_resnet20")
    assert_one_line(code, capsys.readouterr().err, "unexpected layer2.0.downsample.0.weight", "shape conv1.weight")


def test_numbers_that_are_none_are_refused(capsys: pytest.CaptureFixture) -> None:
    picture(Path("a.png"))
    net = small_net()
    net.fc.weight.data[0, 0] = float("nan")
    torch.save(net.state_dict(), "nan.pth")
    assert_one_line(predict("a.png", weights="nan.pth"), capsys.readouterr().err, "not finite")


def test_weights_that_give_no_number_are_refused(capsys: pytest.CaptureFixture) -> None:
    picture(Path("a.png"))
    net = small_net()
    net.bn1.running_var.neg_()
    torch.save(net.state_dict(), "net.pth")
    assert_one_line(predict("a.png"), capsys.readouterr().err, "net.pth", "not finite")


def test_integers_are_no_weights(capsys: pytest.CaptureFixture) -> None:
    picture(Path("a.png"))
    state = small_net().state_dict()
    torch.save({name: tensor.to(torch.int8) for name, tensor in state.items()}, "net.pth")
    assert_one_line(predict("a.png"), capsys.readouterr().err, "of another kind conv1.weight torch.int8", "more")


def test_weights_that_cannot_be_downloaded(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: models.WeightsEnum, **options: object) -> None:
        raise URLError("no route to host")

    picture(Path("a.png"))
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", fail)
    assert_one_line(predict("a.png", weights="DEFAULT"), capsys.readouterr().err, "cannot read DEFAULT", "no route")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["predict", "a.png"], "--weights"),
        (["predict", "a.png", "--weights", "IMAGENET22K"], "IMAGENET1K_V1"),
        (["predict", "a.png", "--weights", "DEFAULT", "--arch", "cifar_resnet20"], "no published weights"),
        (["predict", "a.png", "--weights", "net.pth", "--arch", "vgg16"], "resnet18"),
        (["predict", "--weights", "net.pth"], "IMAGE"),
        (["predict", "a.png", "--weights", "net.pth", "--top", "0"], "above 0"),
        (["predict", "a.png", "--weights", "net.pth", "--json", "/dev/null/out.json"], "/dev/null/out.json"),
        (["evaluate", "--weights", "net.pth"], "--data"),
        (["evaluate", "--weights", "net.pth", "--data", "digits"], "imagefolder:PATH"),
        (["evaluate", "--weights", "net.pth", "--arch", ARCH, "--data", "imagefolder:nowhere"], "nowhere"),
        (["evaluate", "--data", "imagefolder:."], "--weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_of_the_user(
    arguments: list[str], word: str, net: torch.nn.Module, capsys: pytest.CaptureFixture
) -> None:
    picture(Path("a.png"))
    assert_one_line(cli.main(arguments), capsys.readouterr().err, word)


@pytest.mark.parametrize("missing", ["torchvision", "safetensors"])
def test_missing_package_is_named_with_its_extra(
    missing: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(Path("a.png"))
    Path("net.safetensors").touch()
    monkeypatch.setitem(sys.modules, missing, None)
    assert_one_line(predict("a.png", weights="net.safetensors"), capsys.readouterr().err, missing, "fusedres[deploy]")


# Evaluation


def evaluate(folder: str) -> int:
    options = ["--arch", ARCH, "--weights", "net.pth", "--image-size", str(SIZE), "--batch", "4", "--json", "out.json"]
    return cli.main(["evaluate", "--data", f"imagefolder:{folder}", *options, "--engine", "reference"])


def folder_of_classes(root: Path, classes: int = CLASSES) -> list[tuple[str, int]]:
    """Two pictures a class; their paths and classes."""
    found = []
    for number in range(classes):
        (root / f"class{number}").mkdir(parents=True)
        for i in range(2):
            path = root / f"class{number}" / f"{i}.png"
            picture(path, seed=10 * number + i)
            found.append((str(path), number))
    return found


@pytest.mark.parametrize("root", ["data", "data/val"])
def test_evaluate_counts_right_answers(root: str, net: torch.nn.Module, capsys: pytest.CaptureFixture) -> None:
    samples = folder_of_classes(Path(root))
    target = torch.tensor([number for _, number in samples])[:, None]
    guesses = expected(net, *(path for path, _ in samples)).topk(5).indices
    assert evaluate("data") == 0
    result = json.loads(Path("out.json").read_text())
    assert result["pictures"] == len(samples)
    assert result["top1"] == float((guesses[:, :1] == target).double().mean())
    assert result["top5"] == float((guesses == target).any(1).double().mean())
    assert 0 < result["top5"] < 1
    assert f"{100 * result['top5']:.2f}%" in capsys.readouterr().out


def test_evaluate_stops_at_a_damaged_picture(net: torch.nn.Module, capsys: pytest.CaptureFixture) -> None:
    folder_of_classes(Path("data"))
    damage(Path("data/class3/0.png"), "text")
    assert_one_line(evaluate("data"), capsys.readouterr().err, "data/class3/0.png", "no picture")


def test_evaluate_needs_as_many_folders_as_classes(net: torch.nn.Module, capsys: pytest.CaptureFixture) -> None:
    folder_of_classes(Path("data"), classes=3)
    assert_one_line(evaluate("data"), capsys.readouterr().err, "3 classes", str(CLASSES))


def test_photo_needs_no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    picture(Path("a.png"))
    assert photo.read(Path("a.png"), SIZE).shape == (1, 3, SIZE, SIZE)
    with pytest.raises(UserError, match=r"b\.png"):
        photo.read(Path("b.png"), SIZE)
