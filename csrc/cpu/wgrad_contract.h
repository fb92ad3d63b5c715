// The product behind every weight gradient: dw[k, tap, c] = sum over pixels of g[pixel, k] * x[pixel at tap, c].
#pragma once

#include "cpu/wgrad_operand.h"

namespace fusedres::cpu {

// g: (N, P, Q, K) and x: (N, H, W, C) of T, prologues applied; dw: (K, R, S, C) of Out. Products are summed in acc_t<T>
// over a block of pixels, and these sums in Tile. Bitwise the same for any number of threads.
template <typename T, typename Tile, typename Out>
void contract_pixels(const WgradProblem& problem, const WgradOperand<T>& g, const WgradOperand<T>& x, Out* dw);

}  // namespace fusedres::cpu
