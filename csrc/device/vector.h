// 16 bytes at a time between memory and registers.
#pragma once

#include "device/memory.h"
#include "device/scalar.h"

namespace fusedres::device {

// 16 bytes of T unless told: 8 of a 16-bit type, 4 float32.
template <typename T, int kCount = 16 / sizeof(T)>
struct alignas(kCount * sizeof(T)) Vector {
  static constexpr int kSize = kCount;
  T value[kCount];
};

// `from` and `to` are aligned to the vector's bytes.
template <typename T, int kCount = 16 / sizeof(T)>
FUSEDRES_DEVICE Vector<T, kCount> load_vector(const T* from) {
  const auto* const vector = readable(reinterpret_cast<const Vector<T, kCount>*>(from));
  return *static_cast<const Vector<T, kCount>*>(__builtin_assume_aligned(vector, sizeof *vector));
}

template <typename T, int kCount>
FUSEDRES_DEVICE void store_vector(T* to, const Vector<T, kCount>& vector) {
  auto* const target = writable(reinterpret_cast<Vector<T, kCount>*>(to));
  *static_cast<Vector<T, kCount>*>(__builtin_assume_aligned(target, sizeof vector)) = vector;
}

// kCount values of any alignment a T may have, `valid` of them in memory: the rest is `fill` and is not read.
template <typename T, int kCount>
FUSEDRES_DEVICE void load_floats(const T* from, int valid, float fill, float (&out)[kCount]) {
  constexpr int kSize = Vector<T>::kSize;
  if constexpr (kCount % kSize == 0) {
    if (valid >= kCount && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      FUSEDRES_UNROLL
      for (int i = 0; i < kCount; i += kSize) {
        const Vector<T> vector = load_vector(from + i);
        FUSEDRES_UNROLL
        for (int j = 0; j < kSize; ++j) out[i + j] = to_float(vector.value[j]);
      }
      return;
    }
  }
  FUSEDRES_UNROLL
  for (int i = 0; i < kCount; ++i) out[i] = i < valid ? to_float(load_scalar(from + i)) : fill;
}

// The first `valid` of kCount values, rounded to T.
template <typename T, int kCount>
FUSEDRES_DEVICE void store_floats(T* to, int valid, const float (&values)[kCount]) {
  constexpr int kSize = Vector<T>::kSize;
  if constexpr (kCount % kSize == 0) {
    if (valid >= kCount && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      FUSEDRES_UNROLL
      for (int i = 0; i < kCount; i += kSize) {
        Vector<T> vector;
        FUSEDRES_UNROLL
        for (int j = 0; j < kSize; ++j) vector.value[j] = from_float<T>(values[i + j]);
        store_vector(to + i, vector);
      }
      return;
    }
  }
  FUSEDRES_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (i < valid) store_scalar(to + i, from_float<T>(values[i]));
  }
}

}  // namespace fusedres::device
