// The stem's tail, max pooling of a BN and ReLU that are never stored, and its backward. Included per instruction set.

#include "cpu/prologue.h"
#include "cpu/running_sums.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// Tap numbers, one for each lane of a vector of computations on T: uint8 in memory, in registers as wide as the lanes.
template <typename T, typename Integer>
struct LanesOf {
  typedef Integer type __attribute__((vector_size(kLanes<T> * sizeof(Integer))));
};
template <typename T>
using Bytes = typename LanesOf<T, uint8_t>::type;
template <typename T>
using Taps = decltype(Vec<acc_t<T>>{} > Vec<acc_t<T>>{});

// In steps of a factor of two, which compile to one instruction each; GCC takes a longer step lane by lane.
template <typename T>
FUSEDRES_INLINE Taps<T> widen_taps(Bytes<T> bytes) {
  const auto half = __builtin_convertvector(bytes, typename LanesOf<T, uint16_t>::type);
  return __builtin_convertvector(__builtin_convertvector(half, typename LanesOf<T, int32_t>::type), Taps<T>);
}

template <typename T>
FUSEDRES_INLINE Bytes<T> narrow_taps(Taps<T> taps) {
  const auto half = __builtin_convertvector(taps, typename LanesOf<T, int32_t>::type);
  return __builtin_convertvector(__builtin_convertvector(half, typename LanesOf<T, uint16_t>::type), Bytes<T>);
}

// One window: the pixels of x that it covers, as far as they are inside, and the pixel of y.
struct Window {
  int64_t out, image, h0, w0;
  Range rows, columns;  // of its taps

  // Of tap (r, s).
  int64_t pixel(const Pool& pool, int64_t r, int64_t s) const { return (image * pool.H + h0 + r) * pool.W + w0 + s; }
};

// visit(window) for a block of the N*P rows of the output.
template <typename Visit>
FUSEDRES_INLINE void for_each_window(const Pool& pool, const Block& block, const Visit& visit) {
  const auto taps_inside = [&](int64_t first, int64_t extent) {
    return Range{std::max<int64_t>(-first, 0), std::min(pool.kernel, extent - first)};
  };
  for (int64_t line = block.row_begin; line < block.row_end; ++line) {
    const int64_t h0 = line % pool.P * pool.stride - pool.padding;
    for (int64_t q = 0; q < pool.Q; ++q) {
      const int64_t w0 = q * pool.stride - pool.padding;
      visit(Window{line * pool.Q + q, line / pool.P, h0, w0, taps_inside(h0, pool.H), taps_inside(w0, pool.W)});
    }
  }
}

template <typename T>
void maxpool(const Pool& pool, const T* x, T* y, const Block& block) {
  for_each_window(pool, block, [&](const Window& window) {
    for_each_vector<T>(pool.C, [&](auto lanes, int64_t c) {
      Vec<T> best = Vec<T>{} - std::numeric_limits<T>::infinity();
      for (int64_t r = window.rows.begin; r < window.rows.end; ++r) {
        const T* at = x + window.pixel(pool, r, window.columns.begin) * pool.C + c;
        for (int64_t s = window.columns.begin; s < window.columns.end; ++s, at += pool.C) {
          const Vec<T> value = lanes.load(at);
          best = (value > best) | (value != value) ? value : best;
        }
      }
      lanes.store(y + window.out * pool.C + c, best);
    });
  });
}

template <typename T>
void bn_relu_maxpool(const Pool& pool, const T* z, const acc_t<T>* bn, T* y, uint8_t* tap, const Block& block) {
  using V = Vec<acc_t<T>>;
  const acc_t<T>*scale = bn + 2 * pool.C, *shift = bn + 3 * pool.C;
  for_each_window(pool, block, [&](const Window& window) {
    for_each_vector<T>(pool.C, [&, scale, shift, z](auto lanes, int64_t c) {
      const V channel_scale = lanes.load(scale + c), channel_shift = lanes.load(shift + c);
      V best = V{} - __builtin_inff();
      Taps<T> best_tap{};
      for (int64_t r = window.rows.begin; r < window.rows.end; ++r) {
        for (int64_t s = window.columns.begin; s < window.columns.end; ++s) {
          const V loaded = lanes.load(z + window.pixel(pool, r, s) * pool.C + c);
          const V value = as_stored<T>(relu(bn_apply(channel_scale, loaded, channel_shift)));
          const Taps<T> wins = (value > best) | (value != value);
          best = wins ? value : best;
          best_tap = wins ? Taps<T>{} + static_cast<int>(r * pool.kernel + s) : best_tap;
        }
      }
      lanes.store(y + window.out * pool.C + c, best);
      lanes.store_bits(tap + window.out * pool.C + c, narrow_taps<T>(best_tap));
    });
  });
}

// The pooling windows that hold one pixel: offset of the window's output, and the pixel's tap number in it.
struct Windows {
  int count = 0;
  int64_t offset[256];
  int tap[256];
};

inline void find_windows(const PoolBackward& op, int64_t image, int64_t h, int64_t w, Windows& windows) {
  const Pool& pool = op.pool;
  const Range rows = op.row_windows[h], columns = op.column_windows[w];
  windows.count = 0;
  for (int64_t p = rows.begin; p < rows.end; ++p) {
    const int64_t r = h + pool.padding - p * pool.stride;
    for (int64_t q = columns.begin; q < columns.end; ++q) {
      windows.offset[windows.count] = ((image * pool.P + p) * pool.Q + q) * pool.C;
      windows.tap[windows.count++] = r * pool.kernel + w + pool.padding - q * pool.stride;
    }
  }
}

// visit(windows, row) for the pixels [begin, end) of all images.
template <typename Visit>
FUSEDRES_INLINE void for_each_pixel(const PoolBackward& op, int64_t begin, int64_t end, const Visit& visit) {
  Windows windows;
  int64_t w = begin % op.pool.W, h = begin / op.pool.W % op.pool.H, image = begin / op.pool.W / op.pool.H;
  for (int64_t row = begin; row < end; ++row) {
    find_windows(op, image, h, w, windows);
    visit(windows, row);
    if (++w < op.pool.W) continue;
    w = 0;
    if (++h < op.pool.H) continue;
    h = 0;
    ++image;
  }
}

// g of one pixel: what its windows' gradients route to it, through the ReLU.
template <typename T, typename Lanes>
FUSEDRES_INLINE Vec<acc_t<T>> pixel_gradient(const PoolBackward& op, const Windows& windows, Lanes lanes, int64_t c,
                                             Vec<acc_t<T>> z) {
  using V = Vec<acc_t<T>>;
  const auto* bn = static_cast<const acc_t<T>*>(op.bn);
  V gradient{};
  for (int i = 0; i < windows.count; ++i) {
    const int64_t at = windows.offset[i] + c;
    Bytes<T> bytes;
    lanes.load_bits(op.tap + at, bytes);
    const Taps<T> chosen = widen_taps<T>(bytes) == windows.tap[i];
    gradient += chosen ? lanes.load(static_cast<const T*>(op.dy) + at) : V{};
  }
  return drelu(gradient, bn_apply(lanes.load(bn + 2 * op.pool.C + c), z, lanes.load(bn + 3 * op.pool.C + c)));
}

// First pass, one block of pixels: sum(g) and sum(g*(z - mean)) to state (2, C). scratch (2, block.width).
template <typename T>
void maxpool_sums(const PoolBackward& op, const Block& block, double* state, acc_t<T>* scratch) {
  const int64_t channels = op.pool.C, width = block.width;
  const auto* mean = static_cast<const acc_t<T>*>(op.bn);
  RunningSums<acc_t<T>> sums(2, width, state + block.channel, channels, scratch);
  acc_t<T>* run = sums.run;
  for_each_pixel(op, block.row_begin, block.row_end, [&](const Windows& windows, int64_t row) {
    const T* z = static_cast<const T*>(op.z) + row * channels;
    for_each_vector<T>(width, [&, run, z](auto lanes, int64_t i) {
      const int64_t c = block.channel + i;
      const auto value = lanes.load(z + c), g = pixel_gradient<T>(op, windows, lanes, c, value);
      lanes.store(run + i, lanes.load(run + i) + g);
      lanes.store(run + width + i, lanes.load(run + width + i) + g * (value - lanes.load(mean + c)));
    });
    sums.end_row();
  });
  sums.flush();
}

// Second pass: g again, and dz = a*g + b*(z - mean) + c with factors (4, C).
template <typename T>
void maxpool_dz(const PoolBackward& op, const acc_t<T>* factors, T* dz, const Block& block) {
  const int64_t channels = op.pool.C;
  for_each_pixel(op, block.row_begin, block.row_end, [&](const Windows& windows, int64_t row) {
    const T* z = static_cast<const T*>(op.z) + row * channels;
    for_each_vector<T>(channels, [&, z](auto lanes, int64_t c) {
      const auto value = lanes.load(z + c), g = pixel_gradient<T>(op, windows, lanes, c, value);
      lanes.store(dz + row * channels + c, dbn_apply(lanes, factors, channels, c, g, value));
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
