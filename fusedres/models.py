"""The registry of model constructors, and how a constructor is made from one row of its family's table."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import nn

from fusedres.weights import Weights, resolve

N = TypeVar("N", bound=nn.Module)
N_co = TypeVar("N_co", bound=nn.Module, covariant=True)


class Constructor(Protocol[N_co]):
    """A function that builds one network: torchvision's signature."""

    def __call__(self, *, weights: Weights = None, progress: bool = True, **kwargs: Any) -> N_co:
        """Build the network; ``weights`` and ``kwargs`` as the constructor's own docstring says."""


#: Every constructor by its name: resnet18, ..., plain18, ..., cifar_resnet20, ..., cifar_plain20, ...
MODELS: dict[str, Constructor[nn.Module]] = {}

_DOC = """{summary}

Args:
    weights: None for random weights, or {published}the path of a checkpoint (.pth, .pt,
        .safetensors; plain, or wrapped as training scripts save it). Loading is strict.
    progress: show a progress bar while weights are downloaded.
    **kwargs: keywords of :class:`{network}`.{fixed}

Returns:
    {network}: x (N, C, H, W) -> logits (N, num_classes).

Raises:
    ValueError: a keyword contradicts the name or the weights, or ``weights`` is no known name.
    TypeError: ``weights`` is a member of another model's enum.
    RuntimeError: the checkpoint does not fit the model.
"""


def constructor(
    name: str, network: type[N], *args: Any, summary: str, enum: str | None = None, **fixed: Any
) -> Constructor[N]:
    """The constructor ``name``: builds ``network(*args, **fixed, **kwargs)``, and is registered in ``MODELS``.

    ``enum`` names torchvision's weights enum for this network; ``fixed`` are the keywords its name promises.
    """

    def construct(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> N:
        if enum is not None and weights is None and "pretrained" in kwargs:
            weights = bool(kwargs.pop("pretrained"))
        checkpoint = resolve(weights, enum)
        for keyword, value in fixed.items():
            _fix(kwargs, keyword, value)
        if checkpoint is not None and checkpoint.num_classes is not None:
            _fix(kwargs, "num_classes", checkpoint.num_classes)
        model = network(*args, **kwargs)
        if checkpoint is not None:
            checkpoint.load_into(model, progress)
        return model

    construct.__name__ = construct.__qualname__ = name
    construct.__module__ = network.__module__
    construct.__annotations__["return"] = network.__name__
    construct.__doc__ = _DOC.format(
        summary=summary,
        network=network.__name__,
        published=f"a member of torchvision's ``{enum}`` or its name, or " if enum else "",
        fixed="".join(f"\n        ``{keyword}`` is {value}." for keyword, value in fixed.items()),
    )
    MODELS[name] = construct
    return construct


def _fix(kwargs: dict[str, Any], keyword: str, value: Any) -> None:
    """Set a keyword that the model's name or weights determine; ValueError where the caller asked for another value."""
    if kwargs.setdefault(keyword, value) != value:
        raise ValueError(f"The parameter '{keyword}' expected value {value} but got {kwargs[keyword]} instead.")
