// Means over the pixels of one image. Included per instruction set.

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

}  // namespace fusedres::cpu::FUSEDRES_ISA
