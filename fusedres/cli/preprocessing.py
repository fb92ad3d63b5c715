"""From a picture to a network's input, as torchvision does it for its published weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusedres.cli.photo import MEAN, STD


@dataclass(frozen=True)
class Preprocessing:
    """The shorter side becomes ``resize`` pixels, the centre of ``crop`` x ``crop`` is kept and normalised."""

    resize: int
    crop: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    interpolation: str = "bilinear"

    @classmethod
    def standard(cls, crop: int) -> Preprocessing:
        """What most ResNets are evaluated with on ImageNet, and ``fusedres train`` evaluates with on image folders."""
        return cls(crop * 256 // 224, crop)

    @classmethod
    def of(cls, weights: Any) -> Preprocessing:
        """What a member of torchvision's weights enums was evaluated with."""
        preset = weights.transforms()
        (resize,), (crop,) = preset.resize_size, preset.crop_size
        return cls(resize, crop, tuple(preset.mean), tuple(preset.std), preset.interpolation.value)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """What ``dataclasses.asdict`` wrote; ValueError where that is not what ``fields`` are."""
        from torchvision.transforms import InterpolationMode

        try:
            resize, crop = (int(fields[side]) for side in ("resize", "crop"))
            mean, std = (tuple(map(float, fields[name])) for name in ("mean", "std"))
            interpolation = InterpolationMode(fields["interpolation"]).value
        except (KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if not (0 < crop <= resize and len(mean) == len(std) == 3 and min(std) > 0):
            raise ValueError(f"{dict(fields)} is no way to read a picture")
        return cls(resize, crop, mean, std, interpolation)

    def sized(self, crop: int | None) -> Preprocessing:
        """The same for another side of the crop; None leaves it."""
        if crop is None:
            return self
        return dataclasses.replace(self, crop=crop, resize=crop * self.resize // self.crop)

    def __call__(self, picture: Any) -> Tensor:
        """A picture of Pillow's in RGB -> (3, crop, crop) float32."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        picture = F.resize(picture, [self.resize], InterpolationMode(self.interpolation))
        pixels = F.to_tensor(F.center_crop(picture, [self.crop]))
        return F.normalize(pixels, list(self.mean), list(self.std))
