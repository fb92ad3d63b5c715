// Per-channel (count, mean, M2) of an activation, read once from memory. Included per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

// Adds kRows rows into sums[c] += value and, around `centre`, squares[c] += value^2 with value = z - centre.
// Several rows at once: fewer accesses to the accumulators, and shorter float runs.
template <int kRows, bool kCentred, typename T>
FUSEDRES_INLINE void add_rows(const T* z, int64_t channels, const acc_t<T>* centre, acc_t<T>* sums, acc_t<T>* squares) {
  using V = Vec<acc_t<T>>;
  for_each_vector<T>(channels, [=](auto lanes, int64_t c) {
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

template <bool kCentred, typename T>
void add_tile(const T* z, int64_t rows, int64_t channels, const acc_t<T>* centre, acc_t<T>* sums, acc_t<T>* squares) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) add_rows<4, kCentred>(z + row * channels, channels, centre, sums, squares);
  for (; row < rows; ++row) add_rows<1, kCentred>(z + row * channels, channels, centre, sums, squares);
}

// Joins the statistics b to a: Chan, Golub and LeVeque 1979, with the mean as a weighted mean so that infinity stays.
FUSEDRES_INLINE void merge_stats(double count_b, double mean_b, double m2_b, double count_a, double& mean_a,
                                 double& m2_a) {
  const double weight_b = count_b / (count_a + count_b);
  const double delta = mean_b - mean_a;
  mean_a = mean_a * (1 - weight_b) + mean_b * weight_b;
  m2_a += m2_b + delta * delta * count_a * weight_b;
}

// Statistics of `rows` rows in tiles of `tile_rows`, which stay in the cache for their second pass. M2 is taken around
// the tile's mean as rounded to the accumulation type, and both are then corrected for that rounding.
// mean, m2 (channels); scratch (3 * channels).
template <typename T>
void chunk_stats(const T* z, int64_t rows, int64_t channels, int64_t tile_rows, double* __restrict mean,
                 double* __restrict m2, acc_t<T>* scratch) {
  acc_t<T>* __restrict sums = scratch;
  acc_t<T>* __restrict squares = scratch + channels;
  acc_t<T>* __restrict centre = scratch + 2 * channels;
  for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
  for (int64_t row = 0; row < rows; row += tile_rows) {
    const int64_t count = rows - row < tile_rows ? rows - row : tile_rows;
    const T* tile = z + row * channels;
    for (int64_t c = 0; c < channels; ++c) sums[c] = squares[c] = 0;
    add_tile<false>(tile, count, channels, centre, sums, squares);
    for (int64_t c = 0; c < channels; ++c) {
      centre[c] = sums[c] / count;
      sums[c] = 0;
    }
    add_tile<true>(tile, count, channels, centre, sums, squares);
    for (int64_t c = 0; c < channels; ++c) {
      const double sum = sums[c], rounding = sum / count;
      const double tile_mean = rounding == rounding ? centre[c] + rounding : centre[c];  // NaN: the mean is infinite
      merge_stats(count, tile_mean, squares[c] - sum * rounding, row, mean[c], m2[c]);
    }
  }
}

// Joins all chunks for channels [begin, end): state is (chunks, 2, channels), stats (3, channels).
template <typename Acc>
void join_stats(const Chunks& chunks, const double* state, int64_t channels, int64_t begin, int64_t end, Acc* stats) {
  for (int64_t c = begin; c < end; ++c) {
    double mean = 0, m2 = 0;
    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) {
      const double* from = state + chunk * 2 * channels + c;
      merge_stats(chunks.end(chunk) - chunks.begin(chunk), from[0], from[channels], chunks.begin(chunk), mean, m2);
    }
    stats[c] = chunks.rows;
    stats[channels + c] = mean;
    stats[2 * channels + c] = m2;
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
