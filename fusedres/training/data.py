"""Data sets: real pictures as float tensors (3, H, W), each augmented by a random stream of its own."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Transform = Callable[[Any], Tensor]


class DataError(Exception):
    """The data set is missing, damaged or of another kind than asked for."""


@dataclass(frozen=True)
class Data:
    """A training set and a held-out set of pictures (3, H, W) float32 with integer labels."""

    name: str
    train: Pictures
    test: Pictures
    num_classes: int


class Pictures(Dataset):
    """Pictures and labels; ``transform`` draws from torch's generator.

    Picture ``index`` of epoch ``epoch`` sees the same random numbers in every run, whatever the batch size, the
    number of processes and whether the run was resumed: they follow from ``(seed, epoch, index)`` alone.
    """

    def __init__(self, samples: Any, transform: Transform, seed: int = 0) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.samples[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((((self.seed * 100_003 + self.epoch) << 32) + index) & (2**63 - 1))
            return self.transform(picture), int(label)


class _Tensors:
    """Pictures (N, 3, H, W) held in memory, and their labels (N,)."""

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        self.pictures = pictures
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pictures[index], int(self.labels[index])


def open_data(spec: str, image_size: int | None = None, seed: int = 0) -> Data:
    """The data set ``digits``, ``cifar10:PATH`` or ``imagefolder:PATH``.

    ``image_size`` is the side of the square pictures (default: 16, 32 and 224). DataError where it cannot be read.
    """
    kind, _, path = spec.partition(":")
    if kind == "digits" and not path:
        return _digits(image_size or 16, seed)
    if kind == "cifar10" and path:
        return _cifar10(Path(path), image_size or 32, seed)
    if kind == "imagefolder" and path:
        return _imagefolder(Path(path), image_size or 224, seed)
    raise DataError(f"unknown data {spec!r}: expected digits, cifar10:PATH or imagefolder:PATH")


def _need(module: str, package: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{what} needs {package}: pip install 'fusedres[train]'") from None


def _random_shift(picture: Tensor, reach: int) -> Tensor:
    """The picture moved by up to ``reach`` pixels along each axis, zeros moving in (a padded random crop)."""
    _, height, width = picture.shape
    top, left = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    padded = torch.nn.functional.pad(picture, (reach, reach, reach, reach))
    return padded[:, top : top + height, left : left + width]


def _resize(pictures: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) -> (N, 3, size, size), bilinear."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    return torch.nn.functional.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)


def _normalize(pictures: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (pictures - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def _identity(picture: Tensor) -> Tensor:
    return picture


def _digits(size: int, seed: int) -> Data:
    """1797 handwritten digits of 8x8 pixels and 16 grey levels, a fifth of each class held out (always the same)."""
    datasets = _need("sklearn.datasets", "scikit-learn", "the digits data set")
    selection = _need("sklearn.model_selection", "scikit-learn", "the digits data set")
    pixels, labels = datasets.load_digits(return_X_y=True)
    train, test = selection.train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    pictures = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    mean, std = pictures[train].mean().view(1), pictures[train].std().view(1)
    pictures = _resize(_normalize(pictures, mean, std), size).repeat(1, 3, 1, 1)
    targets = torch.from_numpy(labels).long()

    def shift(picture: Tensor) -> Tensor:
        return _random_shift(picture - blank, reach) + blank

    blank, reach = float(-mean / std), max(1, size // 8)  # up to one pixel of the 8x8 original
    return Data(
        "digits",
        Pictures(_Tensors(pictures[train], targets[train]), shift, seed),
        Pictures(_Tensors(pictures[test], targets[test]), _identity),
        10,
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, strings and NumPy arrays, and nothing that could run code."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")


def _cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One file of the "python version" of CIFAR-10: pictures (N, 3, 32, 32) uint8 and labels (N,)."""
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        pixels = np.asarray(batch[b"data"], dtype=np.uint8)
        return torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.tensor(batch[b"labels"])
    except FileNotFoundError:
        raise DataError(f"{path} is missing: expected the python version of CIFAR-10, unpacked") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} is not a batch of CIFAR-10: {error}") from error


def _cifar10(folder: Path, size: int, seed: int) -> Data:
    """CIFAR-10 with the augmentation of He et al. 2015: a 4-pixel padded random crop and a random mirror image."""
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    parts = [_cifar_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    train = _Tensors(torch.cat([pictures for pictures, _ in parts]), torch.cat([labels for _, labels in parts]))
    test = _Tensors(*_cifar_batch(folder / "test_batch"))
    mean = train.pictures.mean((0, 2, 3), dtype=torch.float32)
    std = (train.pictures.float() - mean.view(3, 1, 1)).square().mean((0, 2, 3)).sqrt()

    def prepare(picture: Tensor) -> Tensor:
        return _resize(_normalize(picture.float(), mean, std)[None], size)[0]

    def crop_and_mirror(picture: Tensor) -> Tensor:
        shifted = _random_shift(prepare(picture), size // 8)
        return shifted.flip(-1) if torch.rand(()) < 0.5 else shifted

    return Data("cifar10", Pictures(train, crop_and_mirror, seed), Pictures(test, prepare), 10)


def _imagefolder(folder: Path, size: int, seed: int) -> Data:
    """``folder/train/CLASS/*`` and ``folder/val/CLASS/*`` with the usual ImageNet transforms."""
    torchvision = _need("torchvision", "torchvision", "an image folder")
    transforms = torchvision.transforms
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalize,
        ]
    )
    plain = transforms.Compose(
        [
            transforms.Resize(size * 256 // 224),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            normalize,
        ]
    )
    try:
        train = torchvision.datasets.ImageFolder(str(folder / "train"))
        test = torchvision.datasets.ImageFolder(str(folder / "val"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder} is no image folder (train/CLASS/* and val/CLASS/*): {error}") from None
    if train.classes != test.classes:
        raise DataError(f"{folder}: train has the classes {train.classes}, val has {test.classes}")
    return Data("imagefolder", Pictures(train, augment, seed), Pictures(test, plain), len(train.classes))
