"""What trained weights say of themselves: the network's name, how its pictures are made, and who wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fusedres

#: The key that marks a file as this package's, and its values: BN folded into the convs, or as it was trained.
KIND = "fusedres"
FOLDED, TRAINED = "folded network", "trained network"


@dataclass(frozen=True)
class Card:
    """``preprocessing``: from a picture to the network's input, numbers and strings by name."""

    arch: str
    preprocessing: Mapping[str, Any]
    kind: str = TRAINED
    version: str = fusedres.__version__

    def metadata(self) -> dict[str, str]:
        """The card as strings, which are all that safetensors and ONNX keep."""
        preprocessing = json.dumps(self.preprocessing)
        return {KIND: self.kind, "arch": self.arch, "version": self.version, "preprocessing": preprocessing}

    @classmethod
    def of(cls, metadata: Mapping[str, Any], source: object) -> Card | None:
        """The card in the metadata of ``source``; None where there is none. ValueError where it is damaged."""
        if metadata.get(KIND) not in (FOLDED, TRAINED):
            return None
        try:
            preprocessing = json.loads(metadata["preprocessing"])
            return cls(metadata["arch"], preprocessing, metadata[KIND], metadata["version"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source} does not say what network it holds ({type(error).__name__}: {error})"
            ) from error


def attach(card: Card, state: Any) -> None:
    """Put ``card`` into the metadata that PyTorch keeps in a ``state_dict()``: the file stays a plain state_dict."""
    state._metadata[""].update(card.metadata())


def attached(state: Any, source: object) -> Card | None:
    """The card that ``attach`` put into a state_dict; None where there is none. ValueError where it is damaged."""
    metadata = getattr(state, "_metadata", {}).get("", {})
    return Card.of(metadata, source)
