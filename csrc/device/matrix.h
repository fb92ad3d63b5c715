// Tensor-core multiplication: ldmatrix, mma.sync.m16n8k16 with float32 accumulators, and a warp's tile made of them.
#pragma once

#include "device/shared.h"
#ifndef __CUDACC__
#include "emulator/matrix.h"
#endif

namespace fusedres::device {

// Four 8x8 matrices of 16-bit elements. Lane i names row i % 8 of matrix i / 8 (16 aligned bytes); lane l gets from
// each the elements (l / 4, 2 * (l % 4)) and its right neighbour.
FUSEDRES_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  emulator::ldmatrix(out, row, false);
#endif
}

// The same, each matrix transposed.
FUSEDRES_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#else
  emulator::ldmatrix(out, row, true);
#endif
}

// d (16, 8) += a (16, 16) * b (16, 8); T: half | bfloat16.
template <typename T>
FUSEDRES_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  emulator::mma_m16n8k16(d, a, b, [](uint16_t bits) { return to_float(T{bits}); });
#endif
}

// A warp's (16 * kM16, 8 * kN8) float32 accumulators.
//
// Fragment layout of each 16x8 piece: elements 0, 1 are row lane / 4, columns 2 * (lane % 4) and the next; elements 2,
// 3 are the same eight rows below.
template <int kM16, int kN8>
struct Accumulators {
  float value[kM16][kN8][4];

  FUSEDRES_DEVICE void clear() {
    FUSEDRES_UNROLL
    for (int m = 0; m < kM16; ++m) {
      FUSEDRES_UNROLL
      for (int n = 0; n < kN8; ++n) {
        FUSEDRES_UNROLL
        for (int i = 0; i < 4; ++i) value[m][n][i] = 0.0f;
      }
    }
  }

  // visit(m16, n8, row, column, first, second) for each pair of neighbours; row and column are within the warp's tile.
  template <typename Visit>
  FUSEDRES_DEVICE void for_each_pair(const Visit& visit) const {
    const int lane = lane_index(), row = lane / 4, col = lane % 4 * 2;
    FUSEDRES_UNROLL
    for (int m = 0; m < kM16; ++m) {
      FUSEDRES_UNROLL
      for (int half_tile = 0; half_tile < 2; ++half_tile) {
        FUSEDRES_UNROLL
        for (int n = 0; n < kN8; ++n) {
          const float* pair = value[m][n] + half_tile * 2;
          visit(m * 16 + half_tile * 8 + row, n * 8 + col, pair[0], pair[1]);
        }
      }
    }
  }
};

struct KeepAll {
  FUSEDRES_DEVICE void operator()(int /*k16*/, uint32_t (& /*a*/)[4]) const {}
};

// acc += A * B^T over k16 * 16 columns. `a_row(m)`: the address of 16-byte chunk `c` in the row of A that lane & 15
// names in piece m, as a_row(m, c); `b_row(row, c)` the same of B, whose rows are the output's columns.
// `edit(k16, a)` may change a fragment of A before it is used.
template <typename T, int kK16, int kM16, int kN8, typename ARow, typename BRow, typename Edit = KeepAll>
FUSEDRES_DEVICE void multiply_tiles(Accumulators<kM16, kN8>& acc, const ARow& a_row, const BRow& b_row,
                                    const Edit& edit = {}) {
  static_assert(kN8 % 2 == 0, "ldmatrix brings two 8-column pieces of B at a time");
  const int lane = lane_index();
  FUSEDRES_UNROLL
  for (int k = 0; k < kK16; ++k) {
    uint32_t b[kN8 / 2][4];
    FUSEDRES_UNROLL
    for (int n = 0; n < kN8 / 2; ++n)
      load_matrices(b[n], b_row(n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
    FUSEDRES_UNROLL
    for (int m = 0; m < kM16; ++m) {
      uint32_t a[4];
      load_matrices(a, a_row(m, k * 2 + lane / 16));
      edit(k, a);
      FUSEDRES_UNROLL
      for (int n = 0; n < kN8; ++n) {
        const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        multiply_add<T>(acc.value[m][n], a, pair);
      }
    }
  }
}

}  // namespace fusedres::device
