"""docs/block_kernels.md: what it says is what its script computes, and what the kernel asks for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.block_kernels import BLOCKS, DOCS, figure, page
from bench.cuda_usage import shapes


def test_page_and_figure_are_up_to_date() -> None:
    assert (DOCS / "block_kernels.md").read_text() == page(), "python bench/block_kernels.py"
    assert (DOCS / "block_kernels.svg").read_text() == figure(), "python bench/block_kernels.py"
    ElementTree.fromstring(figure())


@pytest.mark.skipif(not shutil.which("c++filt") or not shutil.which("g++"), reason="needs g++ and c++filt")
def test_tiles_and_shared_memory_are_those_of_the_kernel() -> None:
    calls = [f'bottleneck("", {b.C}, {b.F}, {b.side}, 1)' for b in BLOCKS]
    for block, shape in zip(BLOCKS, shapes(calls, 1, "90"), strict=True):
        assert shape.kernel == f"bottleneck_fprop<float16, 1, {block.p}, {block.q}>"
        assert shape.shared_bytes == sum(block.shared().values())
        assert shape.blocks == -(-block.side // block.p) * -(-block.side // block.q)
