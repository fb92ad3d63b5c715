"""Picture files, and one of them as a network's input."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedres.backbone import IMAGENET_CFG
from fusedres.cli.common import UserError

# ImageNet's, as every published ResNet is trained with them.
MEAN, STD = IMAGENET_CFG["mean"], IMAGENET_CFG["std"]

#: What a folder is searched for.
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TRANSPARENT = frozenset({"LA", "PA", "RGBA"})


def find(places: Sequence[Path]) -> list[Path]:
    """The files among ``places``, and the pictures in their folders and subfolders in order of name.

    UserError where a place does not exist, or a folder holds no picture.
    """
    return [path for place in places for path in _find(place)]


def _find(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        yield _checked_file(place)
        return
    found = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"no picture in the folder {place}; known are {', '.join(sorted(SUFFIXES))}")
    yield from found


def _checked_file(path: Path) -> Path:
    """``path``, which may be opened without waiting for a writer; UserError where it is no file."""
    if not path.is_file():
        raise _error(path, "it is no file" if path.exists() else "No such file or directory")
    return path


def _error(path: Path, reason: str) -> UserError:
    return UserError(" ".join(f"cannot read the picture {path}: {reason}".splitlines()))


def open_rgb(path: Path | str) -> Any:
    """The picture at ``path`` in RGB, whole, upright (EXIF), and on white where it is transparent.

    UserError where there is no file, no picture in it, or only a part of one.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError("reading a picture needs pillow: pip install pillow") from None
    path = _checked_file(Path(path))
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("ignore")  # of damaged EXIF, and of a size short of Pillow's limit
            picture.load()
            return _rgb(_upright(picture))
    except UserError as error:
        reason = str(error)
    except UnidentifiedImageError:
        reason = "it is no picture"
    except OSError as error:
        reason = error.strerror or str(error)
    except Image.DecompressionBombError as error:
        reason = str(error)
    except Exception as error:  # a damaged file fails anywhere in Pillow's decoders
        reason = f"it is damaged ({type(error).__name__})"
    raise _error(path, reason)


def _upright(picture: Any) -> Any:
    """``picture`` turned as its EXIF says; as it is where that cannot be read."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF fails anywhere in Pillow's reader of TIFF; the pixels are whole
        return picture


def _rgb(picture: Any) -> Any:
    from PIL import Image

    if picture.mode == "F":
        raise UserError("its pixels are floating-point numbers of an unknown range")
    if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to 8
        grey = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        return Image.merge("RGB", (grey, grey, grey))
    if picture.mode not in TRANSPARENT and "transparency" not in picture.info:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def read(path: Path, size: int) -> Tensor:
    """The picture at ``path`` as (1, 3, size, size) float32: resized, cropped at its centre, normalised.

    UserError as ``open_rgb``.
    """
    picture = open_rgb(path)
    from PIL import ImageOps

    # As torchvision's Resize(256) and CenterCrop(224) do it, for any size.
    square = ImageOps.fit(picture, (size, size), bleed=0.5 * (1 - 224 / 256))
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3)
    scaled = pixels.permute(2, 0, 1).float() / 255
    return ((scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None]


def batch_of(picture: Tensor, count: int) -> Tensor:
    """(1, 3, H, W) -> (count, 3, H, W): the picture and shifted views of it, so that no two are equal."""
    return torch.cat([picture.roll(7 * i, dims=3) for i in range(count)])
