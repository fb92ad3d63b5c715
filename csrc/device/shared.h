// Dynamic shared memory, cut into tiles, and the order in which the chunks of a tile lie.
#pragma once

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
  SharedArena() : block_(emulator::current->block), next_(block_->shared()) {}

  // Behind each tile lies a zone that AddressSanitizer lets nobody touch.
  template <typename T>
  T* take(int count) {
    T* tile = reinterpret_cast<T*>(next_);
    const size_t bytes = count * sizeof(T), whole = round_up(bytes, size_t{kAlignment});
    next_ += whole + emulator::Block::kRedzone;
    used_ += whole;
    if (used_ > block_->shared_bytes) throw std::runtime_error("emulator: more shared memory used than launched with");
    emulator::Block::fence_shared(reinterpret_cast<char*>(tile) + bytes, whole - bytes + emulator::Block::kRedzone,
                                  true);
    return tile;
  }
#endif
  static constexpr int kAlignment = 128;  // a pass over all banks

 private:
#ifndef __CUDACC__
  emulator::Block* block_;
  size_t used_ = 0;
#endif
  unsigned char* next_;
};

constexpr int kChunk = 8;  // 16-bit elements in 16 bytes

// A row-major matrix of 16-bit elements in shared memory; `stride` counts elements, a multiple of 64.
//
// ldmatrix reads eight rows at the same column. Their 16-byte chunks lie in different banks since each row stores its
// chunks permuted by its own number, halved kShift times where every 2^kShift-th row is read.
template <typename T, int kShift = 0>
struct Tile {
  T* data;
  int stride;

  FUSEDRES_DEVICE T* chunk(int row, int index) const {
    return data + row * stride + ((index ^ ((row >> kShift) & 7)) * kChunk);
  }
  FUSEDRES_DEVICE T* at(int row, int col) const { return chunk(row, col / kChunk) + col % kChunk; }

  FUSEDRES_DEVICE uint32_t pair(int row, int col) const { return *reinterpret_cast<const uint32_t*>(at(row, col)); }
  FUSEDRES_DEVICE void set_pair(int row, int col, uint32_t bits) const {
    *reinterpret_cast<uint32_t*>(at(row, col)) = bits;
  }
};

}  // namespace fusedres::device
