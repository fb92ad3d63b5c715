// Work over an activation seen as a (rows, channels) matrix, shared among threads so that no result depends on how many
// there are.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fusedres::cpu {

// Rows [row_begin, row_end) of channels [channel, channel + width).
struct Block {
  int64_t row_begin, row_end, channel, width;

  int64_t rows() const { return row_end - row_begin; }
};

// A partition of a (rows, channels) matrix. It follows from the problem alone, never from the number of threads.
struct Blocks {
  int64_t rows, channels, block_rows, block_width;

  int64_t down() const { return (rows + block_rows - 1) / block_rows; }
  int64_t across() const { return (channels + block_width - 1) / block_width; }
  int64_t count() const { return down() * across(); }

  // Blocks are numbered across first.
  Block operator[](int64_t index) const {
    const int64_t row = index / across() * block_rows, channel = index % across() * block_width;
    return {row, std::min(rows, row + block_rows), channel, std::min(block_width, channels - channel)};
  }
};

constexpr int64_t kBlockBytes = 256 << 10;

// Whole rows, for work without a reduction.
inline Blocks row_blocks(int64_t rows, int64_t channels, int64_t element_size) {
  const int64_t row_bytes = std::max<int64_t>(channels * element_size, 1);
  return {rows, channels, std::max<int64_t>(kBlockBytes / row_bytes, 1), std::max<int64_t>(channels, 1)};
}

// For a reduction over rows: at most 512 channels wide and 256 blocks down, as every block keeps sums for its channels.
inline Blocks reduction_blocks(int64_t rows, int64_t channels, int64_t element_size) {
  constexpr int64_t kMostWide = 512, kMostDown = 256;
  const int64_t width = std::clamp<int64_t>(channels, 1, kMostWide);
  return {rows, channels, std::max(kBlockBytes / (width * element_size), (rows + kMostDown - 1) / kMostDown), width};
}

// function(item) for every item in [0, count), on PyTorch's threads.
template <typename Function>
void parallel_for_each(int64_t count, const Function& function) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) function(item);
  });
}

// function(worker, task) for every task in [0, count): whoever is free takes the next.
template <typename Function>
void share_tasks(int64_t workers, int64_t count, const Function& function) {
  std::atomic<int64_t> next{0};
  parallel_for_each(workers, [&](int64_t worker) {
    for (int64_t task = next++; task < count; task = next++) function(worker, task);
  });
}

}  // namespace fusedres::cpu
