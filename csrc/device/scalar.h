// The 16-bit types: their bits, and the way to float32 and back (round to nearest even, NaN stays NaN).
#pragma once

#include <cstring>

#include "device/platform.h"

namespace fusedres::device {

#ifdef __CUDACC__

using half = __half;
using bfloat16 = __nv_bfloat16;

FUSEDRES_DEVICE float to_float(float x) { return x; }
FUSEDRES_DEVICE float to_float(half x) { return __half2float(x); }
FUSEDRES_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }

template <typename T>
FUSEDRES_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, float>) return x;
}

#else

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

// Scaling by 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal, exactly.
inline float to_float(half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t bits =
      magnitude >= 0x7c00 ? 0x7f800000u | magnitude << 13 : as_bits(as_float(magnitude << 13) * as_float(0x77800000u));
  return as_float(bits | sign);
}

inline uint16_t half_bits(float value) {
  const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds where the last bit of a half is
    return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, half>) return {half_bits(x)};
  if constexpr (std::is_same_v<T, bfloat16>) return {bfloat16_bits(x)};
  if constexpr (std::is_same_v<T, float>) return x;
}

#endif

// Two neighbours in one register, the first in the low bits: how matrix fragments hold them.
template <typename T>
FUSEDRES_DEVICE uint32_t pack(float first, float second) {
  const T pair[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

template <typename T>
FUSEDRES_DEVICE void unpack(uint32_t bits, float (&out)[2]) {
  T pair[2];
  memcpy(pair, &bits, 4);
  out[0] = to_float(pair[0]);
  out[1] = to_float(pair[1]);
}

}  // namespace fusedres::device
