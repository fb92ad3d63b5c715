// Vectors of the instruction set being compiled: loads, stores and conversions. Included by foreach_isa.h, per set.
//
// Compiler vectors (`vector_size`), so that + - * < ?: are written as for scalars and every compiler and CPU has them;
// intrinsics only where the language has no word (float16). Vec<float> holds kLanes<float> floats whatever the element
// type in memory: load widens, store narrows (round to nearest even, NaN and infinity kept).

#define FUSEDRES_INLINE inline __attribute__((always_inline))

namespace fusedres::cpu::FUSEDRES_ISA {

template <typename Lane>
struct VecOf {
  typedef Lane type __attribute__((vector_size(FUSEDRES_VECTOR_BYTES)));
};
template <typename Lane>
using Vec = typename VecOf<Lane>::type;

typedef uint32_t WideBits __attribute__((vector_size(FUSEDRES_VECTOR_BYTES)));
typedef uint16_t NarrowBits __attribute__((vector_size(FUSEDRES_VECTOR_BYTES / 2)));

// Elements in one vector of computations on T.
template <typename T>
constexpr int64_t kLanes = FUSEDRES_VECTOR_BYTES / sizeof(acc_t<T>);

template <typename Lane>
FUSEDRES_INLINE Vec<Lane> broadcast(Lane value) {
  return value - Vec<Lane>{};
}

FUSEDRES_INLINE Vec<float> widen(NarrowBits bits, BFloat16) {
  return (Vec<float>)(__builtin_convertvector(bits, WideBits) << 16);
}

FUSEDRES_INLINE NarrowBits narrow(Vec<float> value, BFloat16) {
  const WideBits bits = (WideBits)value;
  const WideBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WideBits is_nan = (WideBits)(value != value);
  return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), NarrowBits);
}

#if FUSEDRES_VECTOR_BYTES == 64

FUSEDRES_INLINE Vec<float> widen(NarrowBits bits, Float16) { return (Vec<float>)_mm512_cvtph_ps((__m256i)bits); }

FUSEDRES_INLINE NarrowBits narrow(Vec<float> value, Float16) {
  return (NarrowBits)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
}

#elif FUSEDRES_VECTOR_BYTES == 32

FUSEDRES_INLINE Vec<float> widen(NarrowBits bits, Float16) { return (Vec<float>)_mm256_cvtph_ps((__m128i)bits); }

FUSEDRES_INLINE NarrowBits narrow(Vec<float> value, Float16) {
  return (NarrowBits)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
}

#else

// float16 in integer arithmetic. The exponent's bias differs by 127 - 15 = 112; subnormals are rebuilt by one addition
// of a float whose last place is the subnormal's, which is exact and needs no subnormal float32 (they may be flushed).
FUSEDRES_INLINE Vec<float> widen(NarrowBits narrow_bits, Float16) {
  const WideBits bits = __builtin_convertvector(narrow_bits, WideBits);
  const WideBits sign = (bits & 0x8000) << 16;
  const WideBits magnitude = (bits & 0x7fff) << 13;
  const WideBits exponent = bits & 0x7c00;
  const WideBits normal = magnitude + (112u << 23);
  const WideBits special = magnitude + (224u << 23);
  const WideBits subnormal = (WideBits)((Vec<float>)(magnitude + (113u << 23)) - 0x1p-14f);
  return (Vec<float>)(sign | (exponent == 0 ? subnormal : exponent == 0x7c00 ? special : normal));
}

FUSEDRES_INLINE NarrowBits narrow(Vec<float> value, Float16) {
  const WideBits bits = (WideBits)value;
  const WideBits sign = (bits >> 16) & 0x8000;
  const WideBits magnitude = bits & 0x7fffffff;
  const WideBits special = magnitude > 0x7f800000 ? WideBits{} + 0x7e00 : WideBits{} + 0x7c00;
  const WideBits subnormal = (WideBits)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
  const WideBits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const WideBits result = magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? subnormal : normal;
  return __builtin_convertvector(sign | result, NarrowBits);
}

#endif

// load, store: kLanes<T> elements at any address.
FUSEDRES_INLINE Vec<float> load(const float* from) {
  Vec<float> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

FUSEDRES_INLINE Vec<double> load(const double* from) {
  Vec<double> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename Narrow>
FUSEDRES_INLINE Vec<float> load(const Narrow* from) {
  NarrowBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return widen(bits, Narrow{});
}

FUSEDRES_INLINE void store(float* to, Vec<float> value) { std::memcpy(to, &value, sizeof value); }

FUSEDRES_INLINE void store(double* to, Vec<double> value) { std::memcpy(to, &value, sizeof value); }

template <typename Narrow>
FUSEDRES_INLINE void store(Narrow* to, Vec<float> value) {
  const NarrowBits bits = narrow(value, Narrow{});
  std::memcpy(to, &bits, sizeof bits);
}

// The same for the ragged end of a row: `count` < kLanes<T> elements, zero in the other lanes.
template <typename T>
FUSEDRES_INLINE Vec<acc_t<T>> load_partial(const T* from, int64_t count) {
  T buffer[kLanes<T>] = {};
  std::memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}

template <typename T>
FUSEDRES_INLINE void store_partial(T* to, Vec<acc_t<T>> value, int64_t count) {
  T buffer[kLanes<T>];
  store(buffer, value);
  std::memcpy(to, buffer, count * sizeof(T));
}

// In pairs, pairs of pairs and so on.
template <typename T>
FUSEDRES_INLINE T sum_of_lanes(Vec<T> value) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &value, sizeof lanes);
#pragma GCC unroll 4
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Whether no lane is NaN or infinite.
template <typename V>
FUSEDRES_INLINE bool is_finite(V value) {
  const auto lanes = value - value != V{};
  uint64_t words[sizeof(V) / sizeof(uint64_t)], any = 0;
  std::memcpy(words, &lanes, sizeof words);
#pragma GCC unroll 8
  for (const uint64_t word : words) any |= word;
  return any == 0;
}

// A value as a tensor of T holds it.
template <typename T>
FUSEDRES_INLINE Vec<acc_t<T>> as_stored(Vec<acc_t<T>> value) {
  if constexpr (sizeof(T) == 2) return widen(narrow(value, T{}), T{});
  return value;
}

// The first kLanes<T> lanes or, at the ragged end of a row, fewer: how a loop body reads and writes without knowing
// which.
struct AllLanes {
  template <typename Element, typename Bits>
  FUSEDRES_INLINE void load_bits(const Element* from, Bits& bits) const {
    std::memcpy(&bits, from, sizeof bits);
  }
  template <typename Element, typename Bits>
  FUSEDRES_INLINE void store_bits(Element* to, Bits bits) const {
    std::memcpy(to, &bits, sizeof bits);
  }
  template <typename T>
  FUSEDRES_INLINE Vec<acc_t<T>> load(const T* from) const {
    return FUSEDRES_ISA::load(from);
  }
  template <typename T, typename V>
  FUSEDRES_INLINE void store(T* to, V value) const {
    FUSEDRES_ISA::store(to, value);
  }
};

struct SomeLanes {
  int64_t count;

  template <typename Element, typename Bits>
  FUSEDRES_INLINE void load_bits(const Element* from, Bits& bits) const {
    bits = Bits{};
    std::memcpy(&bits, from, count * sizeof(Element));
  }
  template <typename Element, typename Bits>
  FUSEDRES_INLINE void store_bits(Element* to, Bits bits) const {
    std::memcpy(to, &bits, count * sizeof(Element));
  }
  template <typename T>
  FUSEDRES_INLINE Vec<acc_t<T>> load(const T* from) const {
    return load_partial(from, count);
  }
  template <typename T, typename V>
  FUSEDRES_INLINE void store(T* to, V value) const {
    store_partial(to, value, count);
  }
};

// The elements at `kIndex` of a and b in a row, where those of b follow those of a.
template <int... kIndex, typename V>
FUSEDRES_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kIndex...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t> Index __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Index{kIndex...});
#endif
}

// Of two vectors the first (kHigh 0) or second (1) halves, taking turns: elements within each 16 bytes, or 16 bytes.
template <int kHigh, typename V, int... kLane>
FUSEDRES_INLINE V interleave_elements(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kEach = 16 / sizeof(a[0]), kCount = sizeof...(kLane);
  return shuffle<(kLane % 2 * kCount + kLane / kEach * kEach + kLane % kEach / 2 + kHigh * kEach / 2)...>(a, b);
}

template <int kHigh, typename V, int... kLane>
FUSEDRES_INLINE V interleave_sixteens(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kEach = 16 / sizeof(a[0]), kCount = sizeof...(kLane);
  return shuffle<(kLane / kEach % 2 * kCount + kLane / kEach / 2 * kEach + kHigh * kCount / 2 + kLane % kEach)...>(a,
                                                                                                                   b);
}

// Turns kLanes<T> rows into columns: rows[i][j] -> rows[j][i]. A perfect shuffle of 2^n rows, n times, transposes them:
// first inside every 16 bytes of each group of rows that fill 16 bytes, then the 16 bytes of the groups. These are the
// shuffles that cost one instruction each.
template <typename T>
FUSEDRES_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int kCount = kLanes<T>, kEach = 16 / sizeof(T), kGroups = kCount / kEach;
  constexpr std::make_integer_sequence<int, kCount> kAll{};
  Vec<T> turned[kCount];
#pragma GCC unroll 4
  for (int size = 1; size < kEach; size *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      const int first = i / (kEach / 2) * kEach, at = i % (kEach / 2);
      turned[first + 2 * at] = interleave_elements<0>(rows[first + at], rows[first + at + kEach / 2], kAll);
      turned[first + 2 * at + 1] = interleave_elements<1>(rows[first + at], rows[first + at + kEach / 2], kAll);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) rows[i] = turned[i];
  }
  if constexpr (kGroups > 1) {
#pragma GCC unroll 4
    for (int size = 1; size < kGroups; size *= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount / 2; ++i) {
        const int group = i / kEach, at = i % kEach;
        turned[2 * group * kEach + at] = interleave_sixteens<0>(rows[i], rows[i + kCount / 2], kAll);
        turned[(2 * group + 1) * kEach + at] = interleave_sixteens<1>(rows[i], rows[i + kCount / 2], kAll);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) rows[i] = turned[i];
    }
  }
}

// body(lanes, channel) for the vectors of one row of `channels` elements.
template <typename T, typename Body>
FUSEDRES_INLINE void for_each_vector(int64_t channels, const Body& body) {
  int64_t channel = 0;
  for (; channel + kLanes<T> <= channels; channel += kLanes<T>) body(AllLanes{}, channel);
  if (channel < channels) body(SomeLanes{channels - channel}, channel);
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
