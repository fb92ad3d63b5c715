// How kernels reach shared memory, for the emulator's sake: a GPU does what is written here and no more.
#pragma once

#include "device/platform.h"
#ifndef __CUDACC__
#include "emulator/memory.h"
#endif

namespace fusedres::device {

// `from` and `to`, or where the emulator keeps those bytes. Each call is an access that its race detector checks.
template <typename T>
FUSEDRES_DEVICE const T* readable(const T* from) {
#ifdef __CUDACC__
  return from;
#else
  return static_cast<const T*>(emulator::readable(from, sizeof(T)));
#endif
}

template <typename T>
FUSEDRES_DEVICE T* writable(T* to) {
#ifdef __CUDACC__
  return to;
#else
  return static_cast<T*>(emulator::writable(to, sizeof(T)));
#endif
}

// `index`, which must be within `size`.
FUSEDRES_DEVICE int view_index(int index, [[maybe_unused]] int size) {
#ifdef __CUDACC__
  return index;
#else
  return emulator::view_index(index, size);
#endif
}

template <typename T>
FUSEDRES_DEVICE T load_scalar(const T* from) {
  return *readable(from);
}

template <typename T>
FUSEDRES_DEVICE void store_scalar(T* to, T value) {
  *writable(to) = value;
}

}  // namespace fusedres::device
