"""Small trained networks and pictures for the tests of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fusedres.cli import networks

ARCH, CLASSES = "resnet18", 7


def small_net(arch: str = ARCH, classes: int = CLASSES, seed: int = 0) -> Any:
    """``arch`` in eval, with the statistics and the spread of answers of a trained look."""
    model = networks.build(arch, num_classes=classes, seed=seed)
    networks.shake(model)
    return model.eval()


def checkpoint(path: Path, **options: Any) -> Any:
    """Save ``small_net`` at ``path`` and return it."""
    model = small_net(**options)
    torch.save(model.state_dict(), path)
    return model


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Save a picture of random blots at ``path`` and return it in RGB."""
    blots = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(seed)).mul(255).to(torch.uint8)
    image = Image.fromarray(blots.numpy()).resize(size, Image.Resampling.BICUBIC)
    image.save(path)
    return image
