// Dynamic shared memory, cut into tiles, and the order in which the chunks of a tile lie.
#pragma once

#include "device/memory.h"
#include "device/scalar.h"

namespace fusedres::device {

// Hands out dynamic shared memory. Every thread of the block asks for the same tiles in the same order.
class SharedArena {
 public:
#ifdef __CUDACC__
  FUSEDRES_DEVICE SharedArena() {
    extern __shared__ __align__(1024) unsigned char fusedres_dynamic_shared[];
    next_ = fusedres_dynamic_shared;
  }

  template <typename T>
  FUSEDRES_DEVICE T* take(int count) {
    T* tile = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int>(sizeof(T)), kAlignment);
    return tile;
  }
#else
  template <typename T>
  T* take(int count) {
    emulator::Block& block = *emulator::current->block;
    const size_t bytes = count * sizeof(T), offset = used_ + redzones_;
    used_ += round_up(bytes, size_t{kAlignment});
    redzones_ += emulator::SharedMemory::kRedzone;
    if (used_ > block.shared_bytes) throw std::runtime_error("emulator: more shared memory used than launched with");
    return static_cast<T*>(block.tile(offset, bytes));
  }
#endif
  static constexpr int kAlignment = 128;  // a pass over all banks

 private:
#ifdef __CUDACC__
  unsigned char* next_;
#else
  size_t used_ = 0, redzones_ = 0;
#endif
};

constexpr int kChunk = 8;  // 16-bit elements in 16 bytes

// `size` elements of shared memory, one at a time.
template <typename T>
struct SharedArray {
  T* data;
  int size;

  FUSEDRES_DEVICE T* at(int index) const { return data + view_index(index, size); }
  FUSEDRES_DEVICE T load(int index) const { return load_scalar(at(index)); }
  FUSEDRES_DEVICE void store(int index, T value) const { store_scalar(at(index), value); }
};

// A matrix of `rows` rows of 16-bit elements in shared memory; `stride` counts elements, a multiple of 64.
//
// ldmatrix reads eight rows at the same column. Their 16-byte chunks lie in different banks since each row stores its
// chunks permuted by its own number, halved kShift times where every 2^kShift-th row is read.
template <typename T, int kShift = 0>
struct Tile {
  T* data;
  int stride, rows;

  FUSEDRES_DEVICE T* chunk(int row, int index) const {
    row = view_index(row, rows);
    index = view_index(index, stride / kChunk);
    return data + row * stride + ((index ^ ((row >> kShift) & 7)) * kChunk);
  }
  FUSEDRES_DEVICE T* at(int row, int col) const { return chunk(row, col / kChunk) + col % kChunk; }

  FUSEDRES_DEVICE uint32_t pair(int row, int col) const {
    return load_scalar(reinterpret_cast<const uint32_t*>(at(row, col)));
  }
  FUSEDRES_DEVICE void set_pair(int row, int col, uint32_t bits) const {
    store_scalar(reinterpret_cast<uint32_t*>(at(row, col)), bits);
  }
};

}  // namespace fusedres::device
