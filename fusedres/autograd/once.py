"""The backward of what ran fused gives first derivatives to plain calls; whoever would follow it further is refused."""

from __future__ import annotations

import torch

from fusedres.inspection import is_transformed


def refuse_followers() -> None:
    """RuntimeError where this backward is to be differentiated, batched, or to carry tangents.

    torch's ``once_differentiable`` would not do: its error is met only by a backward through everything. Gradients
    asked for by name, as by ``torch.autograd.grad(loss + penalty, parameters)``, would lack the penalty unseen.
    """
    if torch.compiler.is_compiling():  # its graphs refuse a second backward themselves
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused modules are differentiable once, and create_graph=True asks for second derivatives: take those with"
            " torch.func, under which the modules run one by one, or of the eager model"
        )
    if is_transformed():
        raise RuntimeError(
            "the backward of fused modules can neither be batched nor carry"
            " tangents: transform forward and backward as one with torch.func, under which the modules run one by one"
        )
