// The stem's tail, max pooling of a BN and ReLU that are never stored, and its backward. Included per instruction set.

#include "cpu/prologue.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// One tap number (uint8) for each lane of a vector of computations on T.
template <typename T>
struct TapsOf {
  typedef uint8_t type __attribute__((vector_size(kLanes<T>)));
};

// Rows [begin, end) of the N*P rows of the output.
template <typename T>
void bn_relu_maxpool(const Pool& pool, const T* z, const acc_t<T>* bn, T* y, uint8_t* tap, int64_t begin, int64_t end) {
  using V = Vec<acc_t<T>>;
  using Index = decltype(V{} > V{});
  const acc_t<T>*scale = bn + 2 * pool.C, *shift = bn + 3 * pool.C;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t h0 = line % pool.P * pool.stride - pool.padding;
    const int64_t r_begin = h0 < 0 ? -h0 : 0, r_end = h0 + pool.kernel > pool.H ? pool.H - h0 : pool.kernel;
    const T* image = z + line / pool.P * pool.H * pool.W * pool.C;
    for (int64_t q = 0; q < pool.Q; ++q) {
      const int64_t w0 = q * pool.stride - pool.padding;
      const int64_t s_begin = w0 < 0 ? -w0 : 0, s_end = w0 + pool.kernel > pool.W ? pool.W - w0 : pool.kernel;
      const int64_t at = (line * pool.Q + q) * pool.C;
      for_each_vector<T>(pool.C, [=, &pool](auto lanes, int64_t c) {
        const V channel_scale = lanes.load(scale + c), channel_shift = lanes.load(shift + c);
        V best = V{} - __builtin_inff();
        Index best_tap{};
        for (int64_t r = r_begin; r < r_end; ++r) {
          for (int64_t s = s_begin; s < s_end; ++s) {
            const V loaded = lanes.load(image + ((h0 + r) * pool.W + w0 + s) * pool.C + c);
            const V value = as_stored<T>(relu(bn_apply(channel_scale, loaded, channel_shift)));
            const Index wins = (value > best) | (value != value);
            best = wins ? value : best;
            best_tap = wins ? Index{} + static_cast<int>(r * pool.kernel + s) : best_tap;
          }
        }
        lanes.store(y + at + c, best);
        lanes.store_bits(tap + at + c, __builtin_convertvector(best_tap, typename TapsOf<T>::type));
      });
    }
  }
}

// The pooling windows that hold one pixel: offset of the window's output, and the pixel's tap number in it.
struct Windows {
  int count = 0;
  int64_t offset[256];
  int tap[256];
};

inline void find_windows(const Pool& pool, int64_t row, Windows& windows) {
  const int64_t w = row % pool.W + pool.padding, h = row / pool.W % pool.H + pool.padding;
  const int64_t image = row / pool.W / pool.H * pool.P;
  const auto first = [&pool](int64_t at) { return at < pool.kernel ? 0 : (at - pool.kernel) / pool.stride + 1; };
  windows.count = 0;
  for (int64_t p = first(h); p < pool.P && p * pool.stride <= h; ++p) {
    for (int64_t q = first(w); q < pool.Q && q * pool.stride <= w; ++q) {
      windows.offset[windows.count] = ((image + p) * pool.Q + q) * pool.C;
      windows.tap[windows.count++] = (h - p * pool.stride) * pool.kernel + w - q * pool.stride;
    }
  }
}

// g of one pixel: what its windows' gradients route to it, through the ReLU.
template <typename T, typename Lanes>
FUSEDRES_INLINE Vec<acc_t<T>> pixel_gradient(const PoolBackward& op, const Windows& windows, Lanes lanes, int64_t c,
                                             Vec<acc_t<T>> z) {
  using V = Vec<acc_t<T>>;
  using Index = decltype(V{} > V{});
  const auto* bn = static_cast<const acc_t<T>*>(op.bn);
  V gradient{};
  for (int i = 0; i < windows.count; ++i) {
    const int64_t at = windows.offset[i] + c;
    typename TapsOf<T>::type taps;
    lanes.load_bits(op.tap + at, taps);
    const Index chosen = __builtin_convertvector(taps, Index) == windows.tap[i];
    gradient += chosen ? lanes.load(static_cast<const T*>(op.dy) + at) : V{};
  }
  return drelu(gradient, bn_apply(lanes.load(bn + 2 * op.pool.C + c), z, lanes.load(bn + 3 * op.pool.C + c)));
}

// First pass, pixels [begin, end): state (2, C) gets sum(g) and sum(g*(z - mean)); scratch (2, C) holds float runs.
template <typename T>
void maxpool_sums(const PoolBackward& op, int64_t begin, int64_t end, double* __restrict state, void* run_sums) {
  const int64_t channels = op.pool.C;
  const auto* mean = static_cast<const acc_t<T>*>(op.bn);
  auto* __restrict sums = static_cast<acc_t<T>*>(run_sums);
  for (int64_t i = 0; i < 2 * channels; ++i) state[i] = sums[i] = 0;
  Windows windows;
  for (int64_t row = begin; row < end; ++row) {
    find_windows(op.pool, row, windows);
    const T* z = static_cast<const T*>(op.z) + row * channels;
    for_each_vector<T>(channels, [&, sums = sums](auto lanes, int64_t c) {
      const auto value = lanes.load(z + c), g = pixel_gradient<T>(op, windows, lanes, c, value);
      lanes.store(sums + c, lanes.load(sums + c) + g);
      lanes.store(sums + channels + c, lanes.load(sums + channels + c) + g * (value - lanes.load(mean + c)));
    });
    if ((row + 1 - begin) % kRunRows != 0 && row + 1 != end) continue;
    for (int64_t i = 0; i < 2 * channels; ++i) {
      state[i] += sums[i];
      sums[i] = 0;
    }
  }
}

// Second pass: g again, and dz = a*g + b*(z - mean) + c with factors (4, C).
template <typename T>
void maxpool_dz(const PoolBackward& op, const acc_t<T>* factors, T* dz, int64_t begin, int64_t end) {
  const int64_t channels = op.pool.C;
  Windows windows;
  for (int64_t row = begin; row < end; ++row) {
    find_windows(op.pool, row, windows);
    const T* z = static_cast<const T*>(op.z) + row * channels;
    for_each_vector<T>(channels, [&](auto lanes, int64_t c) {
      const auto value = lanes.load(z + c), g = pixel_gradient<T>(op, windows, lanes, c, value);
      lanes.store(dz + row * channels + c, dbn_apply(lanes, factors, channels, c, g, value));
    });
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
