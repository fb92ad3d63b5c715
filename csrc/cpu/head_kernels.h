// Means over the pixels of one image, and the fully connected layer of few images. Included per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

// means[c] of x (pixels, channels) for the channels of `range`. Long sums are cut into runs, whose totals are added.
template <typename T>
void channel_means(const T* x, int64_t pixels, int64_t channels, Range range, T* means) {
  constexpr int64_t kRun = 32;
  for_each_vector<T>(range.size(), [&](auto lanes, int64_t c) {
    const T* const at = x + range.begin + c;
    Vec<T> total{};
    for (int64_t first = 0; first < pixels; first += kRun) {
      Vec<T> run{};
      const int64_t end = std::min(pixels, first + kRun);
      for (int64_t pixel = first; pixel < end; ++pixel) run += lanes.load(at + pixel * channels);
      total += run;
    }
    lanes.store(means + range.begin + c, total / static_cast<T>(pixels));
  });
}

// sums[i][j] = w[i] . x[j], rows of `depth` elements. Long sums are cut into runs, whose totals are added.
template <typename T, int kRows, int kImages>
FUSEDRES_INLINE void head_dots(const T* w, const T* x, int64_t depth, T (&sums)[kRows][kImages]) {
  constexpr int64_t kRun = 128 * kLanes<T>;
  for (auto& row : sums) std::fill_n(row, kImages, T{0});
  for (int64_t first = 0; first < depth; first += kRun) {
    Vec<T> run[kRows][kImages] = {};
    for_each_vector<T>(std::min(kRun, depth - first), [&](auto lanes, int64_t c) {
      Vec<T> values[kImages];
#pragma GCC unroll 2
      for (int j = 0; j < kImages; ++j) values[j] = lanes.load(x + j * depth + first + c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> weights = lanes.load(w + i * depth + first + c);
#pragma GCC unroll 2
        for (int j = 0; j < kImages; ++j) run[i][j] += weights * values[j];
      }
    });
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kImages; ++j) sums[i][j] += sum_of_lanes<T>(run[i][j]);
    }
  }
}

// y[j, f] = w[f] . x[j] + bias[f] for `images` rows of x (depth,) and f of `range`; y (images, features).
template <typename T>
void head_rows(const T* w, const T* bias, const T* x, int64_t images, int64_t depth, Range range, T* y,
               int64_t features) {
  constexpr int kRows = 4, kImages = 2;
  const auto tile = [&](auto rows, auto count, int64_t f, int64_t j) {
    T sums[rows][count];
    head_dots<T, rows, count>(w + f * depth, x + j * depth, depth, sums);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < count; ++k) {
        y[(j + k) * features + f + i] = sums[i][k] + (bias == nullptr ? T{0} : bias[f + i]);
      }
    }
  };
  const auto all_images = [&](auto rows, int64_t f) {
    int64_t j = 0;
    for (; j + kImages <= images; j += kImages) tile(rows, std::integral_constant<int, kImages>{}, f, j);
    if (j < images) tile(rows, std::integral_constant<int, 1>{}, f, j);
  };
  int64_t f = range.begin;
  for (; f + kRows <= range.end; f += kRows) all_images(std::integral_constant<int, kRows>{}, f);
  for (; f < range.end; ++f) all_images(std::integral_constant<int, 1>{}, f);
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
