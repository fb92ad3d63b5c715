// Per-channel (count, mean, M2) of an activation, read once from memory. Included per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

// Adds kRows rows into sums[c] += value and, where kCentred, squares[c] += value^2 with value = z - centre.
template <int kRows, bool kCentred, typename T>
FUSEDRES_INLINE void add_rows(const T* z, int64_t channels, int64_t width, const acc_t<T>* centre, acc_t<T>* sums,
                              acc_t<T>* squares) {
  using V = Vec<acc_t<T>>;
  for_each_vector<T>(width, [=](auto lanes, int64_t c) {
    V sum{}, square{};
    for (int row = 0; row < kRows; ++row) {
      V value = lanes.load(z + row * channels + c);
      if constexpr (kCentred) {
        value -= lanes.load(centre + c);
        square += value * value;
      }
      sum += value;
    }
    lanes.store(sums + c, lanes.load(sums + c) + sum);
    if constexpr (kCentred) lanes.store(squares + c, lanes.load(squares + c) + square);
  });
}

// One row at a time where memory is waited for (it likes one stream), two where the tile is in the cache.
template <bool kCentred, typename T>
void add_tile(const T* z, int64_t rows, int64_t channels, int64_t width, const acc_t<T>* centre, acc_t<T>* sums,
              acc_t<T>* squares) {
  constexpr int kRows = kCentred ? 2 : 1;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    add_rows<kRows, kCentred>(z + row * channels, channels, width, centre, sums, squares);
  if (row < rows) add_rows<1, kCentred>(z + row * channels, channels, width, centre, sums, squares);
}

// Joins the statistics b to a: Chan, Golub and LeVeque 1979, with the mean as a weighted mean so that infinity stays.
FUSEDRES_INLINE void merge_stats(double count_b, double mean_b, double m2_b, double count_a, double& mean_a,
                                 double& m2_a) {
  const double weight_b = count_b / (count_a + count_b);
  const double delta = mean_b - mean_a;
  mean_a = mean_a * (1 - weight_b) + mean_b * weight_b;
  m2_a += m2_b + delta * delta * (count_a * weight_b);
}

// Statistics of one block in tiles of `tile_rows`, which stay in the cache for their second pass. M2 is taken around
// the tile's mean as rounded to the accumulation type, and both are then corrected for that rounding. mean, m2
// (block.width); scratch (3, block.width).
template <typename T>
void block_stats(const T* matrix, int64_t channels, const Block& block, int64_t tile_rows, double* __restrict mean,
                 double* __restrict m2, acc_t<T>* scratch) {
  const int64_t width = block.width;
  acc_t<T>* __restrict sums = scratch;
  acc_t<T>* __restrict squares = scratch + width;
  acc_t<T>* __restrict centre = scratch + 2 * width;
  for (int64_t c = 0; c < width; ++c) mean[c] = m2[c] = sums[c] = 0;
  for (int64_t row = block.row_begin; row < block.row_end; row += tile_rows) {
    const int64_t count = block.row_end - row < tile_rows ? block.row_end - row : tile_rows;
    const T* tile = matrix + row * channels + block.channel;
    add_tile<false>(tile, count, channels, width, centre, sums, squares);
    const double inv_count = 1.0 / count;
    for (int64_t c = 0; c < width; ++c) {
      centre[c] = sums[c] * static_cast<acc_t<T>>(inv_count);
      sums[c] = squares[c] = 0;
    }
    add_tile<true>(tile, count, channels, width, centre, sums, squares);
    for (int64_t c = 0; c < width; ++c) {
      const double sum = sums[c], rounding = sum * inv_count;
      const double tile_mean = rounding == rounding ? centre[c] + rounding : centre[c];  // NaN: the mean is infinite
      merge_stats(count, tile_mean, squares[c] - sum * rounding, row - block.row_begin, mean[c], m2[c]);
      sums[c] = 0;
    }
  }
}

// Joins the blocks of the same channels from the top down, for channels [begin, end).
// state (blocks.down(), 2, channels); stats (3, channels).
template <typename Acc>
void join_stats(const Blocks& blocks, const double* state, int64_t begin, int64_t end, Acc* stats) {
  const int64_t channels = blocks.channels;
  for (int64_t c = begin; c < end; ++c) {
    double mean = 0, m2 = 0;
    for (int64_t i = 0; i < blocks.down(); ++i) {
      const double* from = state + i * 2 * channels + c;
      const Block block = blocks[i * blocks.across()];
      merge_stats(block.rows(), from[0], from[channels], block.row_begin, mean, m2);
    }
    stats[c] = blocks.rows;
    stats[channels + c] = mean;
    stats[2 * channels + c] = m2;
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
