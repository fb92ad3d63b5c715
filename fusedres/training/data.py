"""Data sets: real pictures as float tensors (3, H, W), each augmented by a random stream of its own."""

from __future__ import annotations

import importlib
import pickle
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusedres.backbone import IMAGENET_CFG

Transform = Callable[[Any], Tensor]


class DataError(Exception):
    """The data set is missing, damaged or of another kind than asked for."""


@dataclass(frozen=True)
class Data:
    """A training set and a held-out set of pictures (3, H, W) float32 with integer labels.

    ``preprocessing``: how the held-out pictures were made, as ``fusedres predict`` would make them from picture files.
    """

    name: str
    train: Pictures
    test: Pictures
    num_classes: int
    preprocessing: Mapping[str, Any]


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
            # torch's generator on the CPU takes 32 bits of a seed, so the three numbers are hashed into those.
            torch.manual_seed(zlib.crc32(f"{self.seed} {self.epoch} {index}".encode()))
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


def _preprocessing(resize: int, crop: int, mean: Iterable[float], std: Iterable[float]) -> dict[str, Any]:
    """``resize``: what the shorter side becomes; ``crop``: the square kept; ``mean`` and ``std``: with white as 1."""
    return {
        "resize": resize,
        "crop": crop,
        "mean": list(map(float, mean)),
        "std": list(map(float, std)),
        "interpolation": "bilinear",
    }


def _need(module: str, package: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{what} needs {package}: pip install 'fusedres[train]'") from None


def _random_shift(picture: Tensor, reach: int, fill: float = 0.0) -> Tensor:
    """The picture moved by up to ``reach`` pixels along each axis, ``fill`` moving in (a padded random crop)."""
    _, height, width = picture.shape
    top, left = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    padded = torch.nn.functional.pad(picture, (reach, reach, reach, reach), value=fill)
    return padded[:, top : top + height, left : left + width]


def _resize(pictures: Tensor, size: int) -> Tensor:
    """(N, C, H, W) -> (N, C, size, size), bilinear."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    return torch.nn.functional.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)


def _identity(picture: Tensor) -> Tensor:
    return picture


@dataclass(frozen=True)
class _Shift:
    """The augmentation of digits; no mirror images, for those are no digits."""

    reach: int
    fill: float

    def __call__(self, picture: Tensor) -> Tensor:
        return _random_shift(picture, self.reach, self.fill)


INK = 16  # the largest value of a pixel


def _digits(size: int, seed: int) -> Data:
    """1797 handwritten digits of 8x8 pixels and 16 grey levels, a fifth of each class held out (always the same)."""
    datasets = _need("sklearn.datasets", "scikit-learn", "the digits data set")
    selection = _need("sklearn.model_selection", "scikit-learn", "the digits data set")
    pixels, labels = datasets.load_digits(return_X_y=True)
    train, test = selection.train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    grey = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)
    mean, std = grey[train].mean(), grey[train].std()
    pictures = _resize((grey - mean) / std, size).repeat(1, 3, 1, 1)
    targets = torch.from_numpy(labels).long()
    shift = _Shift(max(1, size // 8), float(-mean / std))  # up to one pixel of the 8x8 original, blank paper moving in
    return Data(
        "digits",
        Pictures(_Tensors(pictures[train], targets[train]), shift, seed),
        Pictures(_Tensors(pictures[test], targets[test]), _identity),
        10,
        _preprocessing(size, size, [float(mean) / INK] * 3, [float(std) / INK] * 3),
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
        return torch.from_numpy(batch[b"data"]).view(-1, 3, 32, 32), torch.tensor(batch[b"labels"])
    except FileNotFoundError:
        raise DataError(f"{path} is missing: expected the python version of CIFAR-10, unpacked") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} is not a batch of CIFAR-10: {error}") from error


@dataclass(frozen=True)
class _CifarTransform:
    """(3, 32, 32) uint8 -> (3, size, size): normalised; with ``augment`` also cropped and mirrored at random.

    He et al. 2015, section 4.2: a crop of the picture padded by 4 pixels of 32, and its mirror image half of the time.
    """

    mean: Tensor
    std: Tensor
    size: int
    augment: bool

    def __call__(self, picture: Tensor) -> Tensor:
        normal = (picture.float() - self.mean) / self.std
        normal = _resize(normal[None], self.size)[0]
        if not self.augment:
            return normal
        shifted = _random_shift(normal, self.size // 8)
        return shifted.flip(-1) if torch.rand(()) < 0.5 else shifted


def _cifar10(folder: Path, size: int, seed: int) -> Data:
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    parts = [_cifar_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    train = _Tensors(torch.cat([pictures for pictures, _ in parts]), torch.cat([labels for _, labels in parts]))
    test = _Tensors(*_cifar_batch(folder / "test_batch"))
    mean = train.pictures.mean((0, 2, 3), dtype=torch.float32).view(3, 1, 1)
    std = (train.pictures.float() - mean).square().mean((0, 2, 3)).sqrt().view(3, 1, 1)
    augmented, plain = (_CifarTransform(mean, std, size, augment) for augment in (True, False))
    preprocessing = _preprocessing(size, size, mean.flatten() / 255, std.flatten() / 255)
    return Data("cifar10", Pictures(train, augmented, seed), Pictures(test, plain), 10, preprocessing)


def _open_picture(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:  # a damaged file fails anywhere in Pillow's decoders
        raise DataError(f"cannot read the picture {path} ({type(error).__name__})") from error


def _imagefolder(folder: Path, size: int, seed: int) -> Data:
    """``folder/train/CLASS/*`` and ``folder/val/CLASS/*`` with the usual ImageNet transforms."""
    torchvision = _need("torchvision", "torchvision", "an image folder")
    transforms = torchvision.transforms
    resize = size * 256 // 224
    normalize = transforms.Normalize(IMAGENET_CFG["mean"], IMAGENET_CFG["std"])
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
            transforms.Resize(resize),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            normalize,
        ]
    )
    try:
        train = torchvision.datasets.ImageFolder(str(folder / "train"), loader=_open_picture)
        test = torchvision.datasets.ImageFolder(str(folder / "val"), loader=_open_picture)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder} is no image folder (train/CLASS/* and val/CLASS/*): {error}") from None
    if train.classes != test.classes:
        raise DataError(f"{folder}: train has the classes {train.classes}, val has {test.classes}")
    preprocessing = _preprocessing(resize, size, IMAGENET_CFG["mean"], IMAGENET_CFG["std"])
    return Data("imagefolder", Pictures(train, augment, seed), Pictures(test, plain), len(train.classes), preprocessing)
