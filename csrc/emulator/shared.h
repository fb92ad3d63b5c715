// A block's shared memory: tiles and variables, behind each a zone that nobody may touch.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace fusedres::emulator {

constexpr int kPoison = 0xFF;  // every byte of NaN in float16, bfloat16 and float32

struct Free {
  void operator()(unsigned char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<unsigned char, Free>;

class SharedMemory {
 public:
  static constexpr size_t kAlignment = 1024, kRedzone = 128, kMostTiles = 32, kStatic = 4096;

  explicit SharedMemory(size_t dynamic)
      : statics_(dynamic + kRedzone * kMostTiles),
        size_((statics_ + kStatic + kAlignment - 1) / kAlignment * kAlignment),
        base_(allocate(size_)) {}
  ~SharedMemory() { fence(0, size_, false); }  // the allocator's next user knows of no zones
  SharedMemory(const SharedMemory&) = delete;

  static Memory allocate(size_t bytes) {
    return Memory(static_cast<unsigned char*>(std::aligned_alloc(kAlignment, bytes)));
  }

  // All poison, nothing opened.
  void reset() {
    fence(0, size_, false);
    std::memset(base_.get(), kPoison, size_);
    fence(0, size_, true);
    parts_.clear();
    variables_.clear();
    next_tile_ = 0;
    next_variable_ = statics_;
  }

  // The tile at `offset`, and whether it is a new one: every thread opens the same tiles in the same order.
  std::pair<void*, bool> tile(size_t offset, size_t bytes) {
    if (offset + bytes > statics_) throw std::runtime_error("emulator: more than 32 tiles");
    const bool fresh = offset >= next_tile_;
    if (fresh) open(offset, bytes);
    if (fresh) next_tile_ = offset + bytes;
    return {base_.get() + offset, fresh};
  }

  // The block's copy of a __shared__ variable, known by the address of a tag, and whether it is a new one.
  std::pair<void*, bool> variable(const void* tag, size_t bytes) {
    const auto [at, fresh] = variables_.emplace(tag, next_variable_);
    if (fresh) {
      if (next_variable_ + bytes > size_) throw std::runtime_error("emulator: too many bytes of __shared__ variables");
      open(next_variable_, bytes);
      next_variable_ += (bytes + kRedzone - 1) / kRedzone * kRedzone + kRedzone;
    }
    return {base_.get() + at->second, fresh};
  }

  size_t size() const { return size_; }
  size_t offset(const void* at) const { return static_cast<const unsigned char*>(at) - base_.get(); }
  bool holds(const void* at) const { return at >= base_.get() && at < base_.get() + size_; }

  // "byte 8 of tile 0 of 256 bytes": tiles and variables are numbered as they were opened.
  std::string place(const void* at) const {
    size_t part = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const bool nearer = parts_[i].offset <= offset(at) && parts_[i].offset > parts_[part].offset;
      if (nearer) part = i;
    }
    if (parts_.empty()) return "shared memory";
    return "byte " + std::to_string(offset(at) - parts_[part].offset) + " of part " + std::to_string(part) + " of " +
           std::to_string(parts_[part].bytes) + " bytes";
  }

  // Whether all of it is poison still.
  bool untouched() {
    fence(0, size_, false);
    return *base_ == kPoison && std::memcmp(base_.get(), base_.get() + 1, size_ - 1) == 0;
  }

 private:
  struct Part {
    size_t offset, bytes;
  };

  void open(size_t offset, size_t bytes) {
    fence(offset, bytes, false);
    parts_.push_back({offset, bytes});
  }

  // AddressSanitizer lets nobody touch what is fenced.
  void fence([[maybe_unused]] size_t offset, [[maybe_unused]] size_t bytes, [[maybe_unused]] bool on) {
#ifdef __SANITIZE_ADDRESS__
    if (on) {
      __asan_poison_memory_region(base_.get() + offset, bytes);
    } else {
      __asan_unpoison_memory_region(base_.get() + offset, bytes);
    }
#endif
  }

  const size_t statics_, size_;
  Memory base_;
  std::vector<Part> parts_;
  std::unordered_map<const void*, size_t> variables_;
  size_t next_tile_ = 0, next_variable_ = 0;
};

}  // namespace fusedres::emulator
