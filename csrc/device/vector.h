// 16 bytes at a time between memory and registers.
#pragma once

#include "device/memory.h"
#include "device/scalar.h"

namespace fusedres::device {

// 16 bytes of T: 8 of a 16-bit type, 4 float32.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// `from` and `to` are aligned to 16 bytes.
template <typename T>
FUSEDRES_DEVICE Vector<T> load_vector(const T* from) {
  return *static_cast<const Vector<T>*>(
      __builtin_assume_aligned(readable(reinterpret_cast<const Vector<T>*>(from)), 16));
}

template <typename T>
FUSEDRES_DEVICE void store_vector(T* to, const Vector<T>& vector) {
  *static_cast<Vector<T>*>(__builtin_assume_aligned(writable(reinterpret_cast<Vector<T>*>(to)), 16)) = vector;
}

// kCount values of any alignment a T may have, `valid` of them in memory: the rest is `fill` and is not read.
template <typename T, int kCount>
FUSEDRES_DEVICE void load_floats(const T* from, int valid, float fill, float (&out)[kCount]) {
  if (kCount == Vector<T>::kSize && valid >= kCount && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const Vector<T> vector = load_vector(from);
    FUSEDRES_UNROLL
    for (int i = 0; i < kCount; ++i) out[i] = to_float(vector.value[i]);
  } else {
    FUSEDRES_UNROLL
    for (int i = 0; i < kCount; ++i) out[i] = i < valid ? to_float(load_scalar(from + i)) : fill;
  }
}

// The first `valid` of kCount values, rounded to T.
template <typename T, int kCount>
FUSEDRES_DEVICE void store_floats(T* to, int valid, const float (&values)[kCount]) {
  if (kCount == Vector<T>::kSize && valid >= kCount && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    Vector<T> vector;
    FUSEDRES_UNROLL
    for (int i = 0; i < kCount; ++i) vector.value[i] = from_float<T>(values[i]);
    store_vector(to, vector);
  } else {
    FUSEDRES_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i < valid) store_scalar(to + i, from_float<T>(values[i]));
    }
  }
}

}  // namespace fusedres::device
