"""The calculus: autograd Functions for a chain of conv-BN-ReLU units with a shortcut, and for the stem.

A BasicBlock is a chain of two units, a Bottleneck of three, a conv-BN-ReLU layer of one. Nothing normalised or
activated is kept for backward: only the chain's input and output, the convs' outputs ``z`` and per-channel vectors.

The last unit of a Bottleneck, and a projection shortcut, are pointwise and widen the tensor. Such a conv needs no
stored output: being linear, ``z - mean = W (p(x) - a_mean)``, so the statistics of its BN follow from the second
moments of its narrow input (known before it runs, hence BN, shortcut add and ReLU join its epilogue), and BN's backward
needs ``z`` only in products that the narrow input gives as well. Such a unit is called *closed* here, any other
*stored*. docs/calculus.md derives it.
"""

from fusedres.autograd.chain import chain
from fusedres.autograd.stage import stage
from fusedres.autograd.stem import stem_chain

__all__ = ["chain", "stage", "stem_chain"]
