// The largest magnitude of a run of elements. Included per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

// Magnitudes are compared as integers: with the sign bit cleared, NaN > infinity > every number, so NaN is never lost.
template <typename T>
acc_t<T> max_abs(const T* values, int64_t count) {
  using V = Vec<acc_t<T>>;
  using Bits = decltype(V{} < V{});
  constexpr int kChains = 4;  // a maximum waits for the one before
  constexpr int64_t kStep = kChains * kLanes<T>;
  const Bits magnitude = ~(Bits)broadcast<acc_t<T>>(-0.0);
  Bits best[kChains] = {};
  const auto meet = [&](int chain, V value) {
    const Bits bits = (Bits)value & magnitude;
    best[chain] = bits > best[chain] ? bits : best[chain];
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    for (int chain = 0; chain < kChains; ++chain) meet(chain, load(values + i + chain * kLanes<T>));
  for_each_vector<T>(count - i, [&](auto lanes, int64_t rest) { meet(0, lanes.load(values + i + rest)); });
  for (int chain = 1; chain < kChains; ++chain) best[0] = best[chain] > best[0] ? best[chain] : best[0];
  int64_t lane = 0;
  for (int64_t other = 1; other < kLanes<T>; ++other)
    if (best[0][other] > best[0][lane]) lane = other;
  return ((V)best[0])[lane];
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
