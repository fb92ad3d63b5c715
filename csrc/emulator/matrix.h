// ldmatrix and mma.sync.m16n8k16 with the operand layouts of the PTX ISA manual ("Matrix Fragments for mma.m16n8k16",
// "ldmatrix"), computed once for the warp by the lane that arrives last.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "emulator/memory.h"

namespace fusedres::emulator {

// Passes that shared memory needs for eight rows of 16 bytes: one if no two fall into the same four banks.
inline int bank_passes(const void* const* rows) {
  int hits[8] = {}, most = 0;
  for (int i = 0; i < 8; ++i) {
    const int at = static_cast<int>(reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8);
    bool repeated = false;
    for (int j = 0; j < i; ++j) repeated |= rows[j] == rows[i];
    if (!repeated) most = std::max(most, ++hits[at]);
  }
  return most;
}

// Lane i gives the address of row i % 8 of matrix i / 8; lane l gets from matrix j the two elements of row l / 4 at
// columns 2 * (l % 4) and the next (transposed: the same of the transposed matrix).
template <int kCount>
void ldmatrix(uint32_t (&out)[kCount], const void* row, bool transposed) {
  struct Slot {
    const void* row;
    uint32_t* out;
  } slot{readable(row, 16), out};
  current->block->meet(~0u, transposed ? "ldmatrix.trans" : "ldmatrix", &slot, [transposed](void** slots) {
    Counters& counters = current->block->counters;
    for (int j = 0; j < kCount; ++j) {
      const void* rows[8];
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i) {
        rows[i] = static_cast<Slot*>(slots[j * 8 + i])->row;
        std::memcpy(matrix[i], rows[i], 16);
      }
      counters.bank_conflicts += bank_passes(rows) - 1;
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = transposed ? matrix[c][r] : matrix[r][c];
        const uint32_t high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
        static_cast<Slot*>(slots[lane])->out[j] = low | high << 16;
      }
    }
    counters.ldmatrix += kCount;
  });
}

// d += a * b: a 16x16 row-major, b 16x8 column-major, d 16x8. `decode` turns 16 bits into a float, exactly.
template <typename Decode>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Decode& decode) {
  struct Slot {
    float* d;
    const uint32_t *a, *b;
  } slot{d, a, b};
  current->block->meet(~0u, "mma", &slot, [&decode](void** slots) {
    const auto [first, second] = current->block->options.swap_registers;
    int at[10];  // registers of A, B and D
    for (int i = 0; i < 10; ++i) at[i] = i == first ? second : i == second ? first : i;
    float A[16][16], B[16][8], D[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Slot& s = *static_cast<Slot*>(slots[lane]);
      const int group = lane / 4, in_group = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = group + (i / 2 % 2) * 8, col = in_group * 2 + i % 2 + (i / 4) * 8;
        A[row][col] = decode(static_cast<uint16_t>(s.a[at[i / 2]] >> (i % 2 * 16)));
      }
      for (int i = 0; i < 4; ++i) {
        B[in_group * 2 + i % 2 + (i / 2) * 8][group] =
            decode(static_cast<uint16_t>(s.b[at[4 + i / 2] - 4] >> (i % 2 * 16)));
        D[group + (i / 2) * 8][in_group * 2 + i % 2] = s.d[at[6 + i] - 6];
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) D[m][n] += A[m][k] * B[k][n];
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Slot& s = *static_cast<Slot*>(slots[lane]);
      for (int i = 0; i < 4; ++i) s.d[at[6 + i] - 6] = D[lane / 4 + (i / 2) * 8][lane % 4 * 2 + i % 2];
    }
    current->block->counters.mma += 1;
  });
}

}  // namespace fusedres::emulator
