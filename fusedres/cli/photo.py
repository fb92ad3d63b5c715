"""A picture file as a network's input."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fusedres.cli.common import UserError

# ImageNet's, as every published ResNet is trained with them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def read(path: Path, size: int) -> Tensor:
    """The picture at ``path`` as (1, 3, size, size) float32: resized, cropped at its centre, normalised.

    UserError where there is no file, or no picture in it.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("reading a picture needs pillow: pip install pillow") from None
    try:
        with Image.open(path) as picture:
            # As torchvision's Resize(256) and CenterCrop(224) do it, for any size.
            square = ImageOps.fit(picture.convert("RGB"), (size, size), bleed=0.5 * (1 - 224 / 256))
    except OSError as error:  # PIL's UnidentifiedImageError is one
        raise UserError(f"cannot read the picture {path}: {error.strerror or 'it is no picture'}") from None
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3)
    scaled = pixels.permute(2, 0, 1).float() / 255
    return ((scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None]


def batch_of(picture: Tensor, count: int) -> Tensor:
    """(1, 3, H, W) -> (count, 3, H, W): the picture and shifted views of it, so that no two are equal."""
    return torch.cat([picture.roll(7 * i, dims=3) for i in range(count)])
