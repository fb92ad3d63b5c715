// Work over the rows of an activation, shared among threads so that no result depends on how many there are.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace fusedres::cpu {

// A partition of `rows` into chunks. It follows from the problem alone, never from the number of threads.
struct Chunks {
  int64_t rows, rows_per_chunk;

  int64_t count() const { return (rows + rows_per_chunk - 1) / rows_per_chunk; }
  int64_t begin(int64_t chunk) const { return chunk * rows_per_chunk; }
  int64_t end(int64_t chunk) const { return std::min(rows, begin(chunk) + rows_per_chunk); }
};

// Chunks of about 256 KiB, whole multiples of `align` rows. At most 256 of them, for a reduction keeps the state of all
// channels once per chunk.
inline Chunks chunks_of(int64_t rows, int64_t row_bytes, int64_t align = 1) {
  constexpr int64_t kChunkBytes = 256 << 10;
  constexpr int64_t kMostChunks = 256;
  const int64_t wanted = std::max(kChunkBytes / std::max<int64_t>(row_bytes, 1), (rows - 1) / kMostChunks + 1);
  return {rows, std::max<int64_t>((wanted + align - 1) / align, 1) * align};
}

// function(item) for every item in [0, count), on PyTorch's threads.
template <typename Function>
void parallel_for_each(int64_t count, const Function& function) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) function(item);
  });
}

}  // namespace fusedres::cpu
