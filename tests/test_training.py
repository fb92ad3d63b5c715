"""Training: data, schedule, checkpoints that survive anything, runs that resume to the bit, fused against eager."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedres.cli import networks
from fusedres.training import (
    CheckpointError,
    Data,
    DataError,
    Settings,
    TrainingDiverged,
    checkpoint,
    fit,
    load_checkpoint,
    loop,
    open_data,
    save_checkpoint,
)
from fusedres.training.data import Pictures, _Tensors
from fusedres.training.schedule import learning_rate, warmup_steps

datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn: digits and photos come with it")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", 8)


def settings(**changes: Any) -> Settings:
    usual = {"arch": "cifar_resnet20", "data": "digits", "image_size": 8, "epochs": 1, "batch": 64, "lr": 0.1}
    usual |= {"momentum": 0.9, "weight_decay": 1e-4, "warmup": 0, "seed": 0, "amp": False}
    return Settings(**(usual | {"eager": False, "memory": "standard"} | changes))


def small_net(eager: bool = False) -> torch.nn.Module:
    fused = networks.build("cifar_resnet20", num_classes=10)
    net = networks.eager_twin("cifar_resnet20", fused)[0] if eager else fused
    return networks.place(net, torch.device("cpu"))


def run(digits: Data, out: Path, eager: bool = False, **options: Any) -> tuple[torch.nn.Module, Any]:
    """A run of two epochs of a tenth of the digits, unless ``options`` say otherwise."""
    out.mkdir(exist_ok=True)
    model = small_net(eager)
    changes = {"epochs": 2, "batch": 32} | options.pop("changes", {})
    return model, fit(model, digits, settings(**changes), out, **options)


@pytest.fixture
def few_digits(digits: Data) -> Data:
    """160 digits, so that an epoch has 5 steps of 32."""
    train = _Tensors(digits.train.samples.pictures[:160], digits.train.samples.labels[:160])
    test = _Tensors(digits.test.samples.pictures[:40], digits.test.samples.labels[:40])
    return dataclasses.replace(
        digits, train=Pictures(train, digits.train.transform), test=Pictures(test, digits.test.transform)
    )


def assert_equal_states(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


# Data


def test_digits_are_split_by_class_and_always_alike(digits: Data) -> None:
    assert (len(digits.train), len(digits.test), digits.num_classes) == (1437, 360, 10)
    counts = torch.bincount(digits.test.samples.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert torch.equal(open_data("digits", 8).test.samples.pictures, digits.test.samples.pictures)


def test_held_out_digits_are_not_trained_on(digits: Data) -> None:
    train = {picture.numpy().tobytes() for picture in digits.train.samples.pictures}
    assert not any(picture.numpy().tobytes() in train for picture in digits.test.samples.pictures)


def test_augmentation_depends_on_seed_epoch_and_picture_alone(digits: Data) -> None:
    pictures = Pictures(digits.train.samples, digits.train.transform, seed=3)
    first = [pictures[i][0] for i in range(20)]
    torch.manual_seed(99)
    assert all(torch.equal(a, pictures[i][0]) for i, a in reversed(list(enumerate(first))))
    pictures.epoch = 1
    assert not all(torch.equal(a, pictures[i][0]) for i, a in enumerate(first))


def test_augmentation_leaves_the_global_random_stream_alone(digits: Data) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digits.train[0]
    assert torch.equal(torch.rand(3), expected)


def test_cifar10_batches_are_read(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy", reason="CIFAR-10 is stored as NumPy arrays")
    pixels = numpy.arange(4 * 3072, dtype=numpy.uint8).reshape(4, 3072)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        with (tmp_path / name).open("wb") as file:
            pickle.dump({b"data": pixels, b"labels": [0, 1, 2, 3]}, file, protocol=2)
    data = open_data(f"cifar10:{tmp_path}")
    assert (len(data.train), len(data.test)) == (20, 4)
    picture, label = data.test[2]
    assert (picture.shape, picture.dtype, label) == ((3, 32, 32), torch.float32, 2)


def test_a_data_file_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Attack()}))
    with pytest.raises(DataError, match="not allowed"):
        open_data(f"cifar10:{tmp_path}")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("spec", ["mnist", "cifar10", "digits:here", "imagefolder:", ""])
def test_unknown_data_is_named(spec: str) -> None:
    with pytest.raises(DataError, match="expected digits, cifar10:PATH or imagefolder:PATH"):
        open_data(spec)


@pytest.mark.parametrize("kind", ["cifar10", "imagefolder"])
def test_missing_data_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path / "nowhere")):
        open_data(f"{kind}:{tmp_path / 'nowhere'}")


def test_image_folder_is_read(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    for split in ("train", "val"):
        for number, label in enumerate(("cat", "dog")):
            (tmp_path / split / label).mkdir(parents=True)
            image.new("RGB", (50, 40), (90 * number, 10, 200)).save(tmp_path / split / label / "a.png")
    data = open_data(f"imagefolder:{tmp_path}", 32)
    assert (len(data.train), data.num_classes) == (2, 2)
    assert data.train[0][0].shape == data.test[1][0].shape == (3, 32, 32)
    assert torch.equal(data.train[1][0], data.train[1][0])  # random, yet the same every time


# Schedule


def test_learning_rate_drops_tenfold_at_half_and_at_three_quarters() -> None:
    rates = [learning_rate(0.1, step, 100) for step in range(100)]
    assert rates[0] == rates[49] == 0.1
    assert rates[50] == rates[74] == pytest.approx(0.01)
    assert rates[75] == rates[99] == pytest.approx(0.001)


def test_only_nets_of_110_layers_and_more_warm_up() -> None:
    assert warmup_steps(56, 64_000) == 0
    assert warmup_steps(110, 64_000) == 400
    assert warmup_steps(110, 500) == 50
    assert [learning_rate(0.1, step, 500, 50) for step in (0, 49, 50)] == pytest.approx([0.01, 0.01, 0.1])


# Checkpoints


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    state = {"a": torch.arange(3), "b": {"c": [1, 2.5, "x", None, True]}}
    save_checkpoint(state, tmp_path / "c.pt")
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded["a"], state["a"])
    assert loaded["b"] == state["b"]
    assert os.listdir(tmp_path) == ["c.pt"]


def test_failure_between_write_and_rename_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint({"step": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", _fail)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint({"step": 2}, path)
    assert load_checkpoint(path) == {"step": 1}
    save_checkpoint({"step": 3}, path)
    assert load_checkpoint(path) == {"step": 3}
    assert os.listdir(tmp_path) == ["c.pt"]  # what was left aside has been taken over


def test_failure_during_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint({"step": 1}, path)

    def half(state: Any, file: io.BufferedWriter) -> None:
        file.write(b"PK half of a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint({"step": 2}, path)
    assert load_checkpoint(path) == {"step": 1}


def _fail(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x80\x02cos\nsystem\n."])
def test_damaged_or_hostile_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.pt is not a readable checkpoint"):
        load_checkpoint(tmp_path / "c.pt")


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "c.pt")


# Runs


@pytest.mark.parametrize("stop", [3, 5, 7], ids=["mid-epoch", "epoch's end", "second epoch"])
def test_resumed_run_equals_the_uninterrupted_one(few_digits: Data, tmp_path: Path, stop: int) -> None:
    whole, history = run(few_digits, tmp_path / "whole")
    run(few_digits, tmp_path / "parts", max_steps=stop)
    resumed, rest = run(few_digits, tmp_path / "parts", resume=True)
    assert_equal_states(whole, resumed)
    assert rest.loss == history.loss
    assert rest.correct == history.correct
    untimed = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in history.epochs]
    assert [{k: row[k] for k in untimed[0]} for row in rest.epochs] == untimed


def test_run_killed_while_saving_resumes_to_the_same_weights(few_digits: Data, tmp_path: Path, monkeypatch) -> None:
    whole, _ = run(few_digits, tmp_path / "whole")
    saves = []

    def replace_once(source: str, target: str, real: Callable = os.replace) -> None:
        saves.append(target)
        if len(saves) == 2:  # the first epoch is saved, the second epoch's save is cut off
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", replace_once)
        with pytest.raises(KeyboardInterrupt):
            run(few_digits, tmp_path / "killed")
    assert load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["step"] == 5
    resumed, _ = run(few_digits, tmp_path / "killed", resume=True)
    assert_equal_states(whole, resumed)


def test_checkpoint_of_other_settings_is_refused(few_digits: Data, tmp_path: Path) -> None:
    run(few_digits, tmp_path, max_steps=1)
    with pytest.raises(CheckpointError, match=r"made with lr 0\.1, this run has 0\.2"):
        run(few_digits, tmp_path, resume=True, changes={"lr": 0.2})


def test_diverged_loss_stops_the_run_and_is_not_saved(few_digits: Data, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="smaller learning rate"):
        run(few_digits, tmp_path, changes={"lr": 1e30})
    assert not (tmp_path / "checkpoint.pt").exists()


class Fed(torch.nn.Module):
    """A net behind a conversion of its input."""

    def __init__(self, net: torch.nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.convert = net, convert

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.convert(x))


def loss_curve(digits: Data, out: Path, who: str, dtype: torch.dtype, lr: float, seed: int = 0) -> torch.Tensor:
    """The losses of the first 20 steps: "fused", "eager", or "eager NCHW"."""
    out = out / f"{who} {dtype} {seed}"
    out.mkdir()
    net = networks.build("cifar_resnet20", num_classes=10, seed=seed)
    if who != "fused":
        net, _ = networks.eager_twin("cifar_resnet20", net)
    if who == "eager NCHW":
        model = Fed(net, torch.Tensor.contiguous)
    else:
        model = Fed(networks.place(net, torch.device("cpu"), dtype), lambda x: x.to(dtype))
    return torch.tensor(
        fit(model, digits, settings(batch=32, lr=lr, seed=seed), out, max_steps=20).loss, dtype=torch.float64
    )


def test_fused_and_eager_losses_are_one_curve_in_float64(digits: Data, tmp_path: Path) -> None:
    fused, eager = (loss_curve(digits, tmp_path, who, torch.float64, lr=0.1) for who in ("fused", "eager"))
    assert len(fused) == 20
    assert torch.allclose(fused, eager, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_fused_losses_in_float32_stay_as_near_to_the_exact_curve_as_eager_ones(digits: Data, tmp_path: Path) -> None:
    """Rounding flips ReLU masks and training amplifies that: eager's two layouts part by some per cent in 20 steps.

    Where a mask flips is luck, one layout's error a thousand times another's on one seed, hence several seeds.
    """
    exact_curves = [loss_curve(digits, tmp_path, "eager", torch.float64, 0.01, seed) for seed in range(5)]
    errors: dict[str, torch.Tensor] = {}
    for who in ("fused", "eager", "eager NCHW"):
        parted = [
            loss_curve(digits, tmp_path, who, torch.float32, 0.01, seed) / exact - 1
            for seed, exact in enumerate(exact_curves)
        ]
        errors[who] = torch.cat(parted).square().mean().sqrt()
        assert torch.cat([p[:3] for p in parted]).abs().max() < 1e-3, who
    assert errors["fused"] <= 2 * max(errors["eager"], errors["eager NCHW"])


def photo_crops(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 3, 64, 64) random crops of two photos, and which photo each is of."""
    photos = [torch.from_numpy(photo.copy()) for photo in datasets.load_sample_images().images]
    which = torch.randint(len(photos), (n,), generator=generator)
    crops = []
    for photo in (photos[i] for i in which):
        row, col = (int(torch.randint(side - 63, (), generator=generator)) for side in photo.shape[:2])
        crops.append(photo[row : row + 64, col : col + 64].permute(2, 0, 1))
    x = (torch.stack(crops).double() / 255 - 0.45) / 0.22
    return x.contiguous(memory_format=torch.channels_last), which


@pytest.mark.parametrize(("arch", "steps"), [("resnet18", 10), ("resnet50", 4)])
def test_steps_on_photos_are_eagers(arch: str, steps: int) -> None:
    """In float64: such steps amplify rounding a hundredfold.

    In float32 eager's own two layouts part by up to a quarter of the loss in ten; ResNet-50's, even so, by 2 % in five.
    """
    fused = networks.build(arch, num_classes=2, seed=0)
    eager, _ = networks.eager_twin(arch, fused)
    losses = []
    for model in (fused.double().train(), eager.double().train()):
        generator, losses_of_model = torch.Generator().manual_seed(1), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        for _ in range(steps):
            x, target = photo_crops(8, generator)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses_of_model.append(loss.item())
        losses.append(losses_of_model)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    buffers = dict(eager.named_buffers())
    for name, buffer in fused.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-3, atol=1e-3)


def test_recompute_trains_like_standard(few_digits: Data, tmp_path: Path) -> None:
    model = networks.place(networks.build("cifar_resnet20", "recompute", 10), torch.device("cpu"))
    (tmp_path / "recompute").mkdir()
    history = fit(model, few_digits, settings(epochs=1, batch=32, lr=0.01), tmp_path / "recompute")
    _, standard = run(few_digits, tmp_path / "standard", changes={"epochs": 1, "lr": 0.01})
    assert history.loss == pytest.approx(standard.loss, rel=1e-3)


def test_autocast_trains(few_digits: Data, tmp_path: Path) -> None:
    model, history = run(few_digits, tmp_path, changes={"epochs": 3, "amp": True, "lr": 0.05})
    assert sum(history.loss[-5:]) < sum(history.loss[:5])
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
def test_digits_are_learnt(tmp_path: Path) -> None:
    data = open_data("digits", 16)
    _, history = run(data, tmp_path, changes={"epochs": 6, "batch": 64, "image_size": 16})
    assert history.epochs[-1]["test_accuracy"] >= 0.9


def test_evaluation_sees_every_picture_once(few_digits: Data) -> None:
    model = small_net()
    loss, accuracy = loop.evaluate(model, few_digits.test, batch=7)
    x = torch.stack([few_digits.test[i][0] for i in range(40)])
    target = few_digits.test.samples.labels
    with torch.inference_mode():
        logits = model.eval()(x)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-4)
    assert accuracy == pytest.approx((logits.argmax(1) == target).float().mean().item())


# Processes of their own


def command(*arguments: object) -> list[str]:
    options = ["--image-size", 8, "--batch", 64, "--threads", 1, *arguments]
    return [sys.executable, "-m", "fusedres", "train", *map(str, options)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_process_killed_at_any_moment_leaves_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    arguments = ("--epochs", 3, "--out")
    subprocess.run(command(*arguments, tmp_path / "whole"), env=environment(), check=True, capture_output=True)
    process = subprocess.Popen(command(*arguments, tmp_path / "killed"), env=environment(), stdout=subprocess.DEVNULL)
    saved = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resume = command(*arguments, tmp_path / "killed", "--resume")
    subprocess.run(resume, env=environment(), check=True, capture_output=True)
    whole, resumed = (load_checkpoint(tmp_path / name / "model.pt") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command("--epochs", 1, "--max-steps", 6, "--out", tmp_path)[1:]
    done = subprocess.run([*launcher, *arguments], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1  # the first process alone reports
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 6
    assert len(state["history"]["loss"]) == 6


def test_a_process_that_torchrun_started_anew_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    arguments = command("--epochs", 2, "--out", tmp_path)
    anew = environment() | {"TORCHELASTIC_RESTART_COUNT": "1"}  # as torchrun's processes have it after a loss
    outputs = [
        subprocess.run([*arguments, *options], env=env, check=True, capture_output=True, text=True).stdout
        for options, env in ((("--max-steps", "25"), anew), ((), anew), ((), environment()))
    ]
    assert "epoch   1/2" in outputs[0]  # without a checkpoint it begins
    assert "epoch   1/2" not in outputs[1]
    assert "epoch   2/2" in outputs[1]
    assert "epoch   1/2" in outputs[2]  # a first start begins, whatever lies there
