"""What runs how: for every fused block and chain of a model, the engine that serves it; for all else, why not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from fusedres import dispatch, tuning
from fusedres.account import built_in_chain, built_in_reason, unfused_convs
from fusedres.blocks import FusedBasicBlock, FusedBottleneck
from fusedres.chains import Chain
from fusedres.engines import EvalChain, FoldedConv
from fusedres.functional import ConvBN, pool_spec, unit_spec
from fusedres.fused_class import is_converted, plan_of
from fusedres.inspection import checked_module, head_reason
from fusedres.layers import FusedConvBNReLU
from fusedres.resnet import StagedNet

#: The ops that every block is made of, its convolutions first.
_OPS = ("conv_fprop", "conv_dgrad", "conv_wgrad", "scale_shift_add_relu", "drelu_dbn")


class Row(NamedTuple):
    """One fused module or chain of a model, the head of a network, or one conv that is not fused.

    ``engine`` is the engine of its convolutions, or "eager" where its modules run one by one, as a head's do;
    ``folded`` the one that runs it in eval without gradients, BN folded. ``reason`` says why modules run one by one,
    why preferred engines were passed over for some op or for the folded form, which ops another engine computes than
    that of the convolutions, and why a downsample runs by itself; it is empty where nothing does. Within ``autotune``
    it also has what was chosen by measurement for the row's convs, on every problem met so far.
    """

    name: str
    kind: str
    engine: str
    folded: str
    reason: str


class Explanation(list[Row]):
    """The rows of a model, and how many of its ``convs`` are ``fused``."""

    def __init__(self, rows: list[Row], convs: int, fused: int) -> None:
        super().__init__(rows)
        self.convs, self.fused = convs, fused

    @property
    def share(self) -> float:
        """Of its convs the share that runs fused; 1.0 where there are none."""
        return self.fused / self.convs if self.convs else 1.0

    def __str__(self) -> str:
        rows = [Row("name", "kind", "engine", "in eval", "why not another"), *self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([*lines, f"{self.fused} of {self.convs} convolutions are fused"])


def explain(model: nn.Module) -> Explanation:
    """A row for every fused block, layer, stem or chain of ``model``, its head, and every conv outside them, in order.

    They are judged as the model is now: its mode, its parameters' device and dtype. ``print`` shows a table.
    TypeError where ``model`` is no module.
    """
    unfused = unfused_convs(checked_module(model))
    names = {module: name for name, module in model.named_modules()}
    heads = {module.fc: module for module in names if isinstance(module, StagedNet)}
    blocks = {m for m in names if isinstance(m, (FusedBasicBlock, FusedBottleneck, FusedConvBNReLU))}
    in_blocks = {conv for block in blocks for conv in block.modules()}
    rows = []
    for name, module in model.named_modules():
        if module in blocks:
            rows.append(_block_row(name, module))
        elif isinstance(module, StagedNet) and built_in_reason(module) is None:
            rows.append(_stem_row(names[module.conv1], module))
        elif module in heads:
            rows.append(_head_row(name, heads[module]))
        elif is_converted(module):
            rows += _chain_rows(name, module, names)
        elif name in unfused and module not in in_blocks:
            rows.append(Row(name, "Conv2d", "eager", "eager", unfused[name]))
    convs = sum(isinstance(module, nn.Conv2d) for module in names)
    return Explanation(rows, convs, convs - len(unfused))


def _block_row(name: str, module: FusedBasicBlock | FusedBottleneck | FusedConvBNReLU) -> Row:
    kind = type(module).__name__
    reason = module.reason()
    if reason is not None:
        return Row(name, kind, "eager", "eager", reason)
    downsample_reason = None if isinstance(module, FusedConvBNReLU) else module.downsample_reason()
    also = [] if downsample_reason is None else [f"downsample: {downsample_reason}"]
    chain = built_in_chain(module)
    return _row(name, kind, chain, _outline(chain), also)


def _stem_row(name: str, network: StagedNet) -> Row:
    """Of a network's stem, under the name of its conv. In eval a max-pool that can joins the conv's launch."""
    chain = built_in_chain(network)
    return _row(name, f"{type(network).__name__}: stem", chain, _outline(chain), [])


def _head_row(name: str, network: StagedNet) -> Row:
    """Of a network's head, under the name of its last layer: eager's modules, or a launch in eval."""
    kind = f"{type(network).__name__}: head"
    fc, reason = network.fc, head_reason(network.avgpool, network.fc)
    if reason is not None or not isinstance(fc, nn.Linear):
        return Row(name, kind, "eager", "eager", str(reason))
    choice = dispatch.choose_head(fc.weight)
    reasons = "; ".join(f"{engine}: {why}" for engine, why in choice.passed_over)
    return Row(name, kind, "eager", choice.engine.name if choice.engine else "eager", reasons)


def _chain_rows(name: str, owner: nn.Module, names: dict[nn.Module, str]) -> Iterator[Row]:
    """The chains of a converted module, under its name or, where it has several, that of their first convs."""
    fused = plan_of(owner).chains
    for chain in fused:
        row_name = name if len(fused) == 1 else names[chain.pairs[0].conv]
        yield _row(row_name, f"{type(owner).__name__}: {chain}", chain, _outline(chain), [])


def _row(name: str, kind: str, chain: Chain, outline: EvalChain[FoldedConv], also: list[str]) -> Row:
    weight = chain.pairs[0].conv.weight
    choices = [dispatch.choose(op, weight.device.type, weight.dtype) for op in _OPS]
    folded = dispatch.choose_folded(outline)
    reasons = [f"{engine}: {why}" for choice in (*choices, folded) for engine, why in choice.passed_over]
    reasons += [*also, *_computed_elsewhere(choices), *_tuned(chain)]
    return Row(name, kind, choices[0].engine.name, folded.engine.name, "; ".join(dict.fromkeys(reasons)))


def _computed_elsewhere(choices: Sequence[dispatch.Choice]) -> Iterator[str]:
    """Which of ``_OPS`` another engine computes than that of the first."""
    others: dict[str, list[str]] = {}
    for op, choice in zip(_OPS, choices, strict=True):
        if choice.engine is not choices[0].engine:
            others.setdefault(choice.engine.name, []).append(op)
    for engine, computed in others.items():
        yield f"{engine} computes {', '.join(computed)}"


def _tuned(chain: Chain) -> Iterator[str]:
    """What ``autotune`` chose for convs like those of ``chain``, where it is asked for."""
    if not tuning.is_on():
        return
    pairs = [*chain.pairs, *([chain.projection] if chain.projection else [])]
    convs = {(tuple(pair.conv.weight.shape), *unit_spec(pair).conv) for pair in pairs}
    for choice in tuning.made(pairs[0].conv.weight.device):
        p = choice.problem
        if ((p.K, p.C // p.groups, p.R, p.S), p.stride, p.padding, p.dilation, p.groups) in convs:
            size = f"{p.N}x{p.C}x{p.H}x{p.W} to {p.K}, {p.R}x{p.S}, {choice.dtype}"
            yield f"tuned: {choice.op} of {size}: {choice.chosen}"


def _outline(chain: Chain) -> EvalChain[FoldedConv]:
    """The kind of chain that it folds to, with its weights as they are: engines look at their sizes alone."""

    def outline(pair: ConvBN) -> FoldedConv:
        return FoldedConv(pair.conv.weight, None, *unit_spec(pair).conv)

    projection = outline(chain.projection) if chain.projection else None
    is_given = chain.adds and not (chain.is_identity or projection)
    pool = None if chain.pool is None else pool_spec(chain.pool)
    return EvalChain(tuple(map(outline, chain.pairs)), projection, chain.is_identity, chain.relu, pool, is_given)
