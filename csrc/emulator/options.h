// How a kernel is emulated: the order of its threads, faults to plant, and what is counted while it runs.
#pragma once

#include <atomic>
#include <cstdint>

namespace fusedres::emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// forward, reverse: the first (last) warp that can run does, up to its next block barrier. seeded: any, a bit each.
enum class Order { forward, reverse, seeded };

struct Options {
  Order order = Order::forward;
  uint64_t seed = 0;
  int workers = 1;         // blocks that run at once
  double patience = 60.0;  // seconds that a block waits for another before it is an error

  // Faults, planted in every thread alike; -1: none. The n-th call of a thread is left out, as if the source lacked it.
  int64_t drop_barrier = -1;
  int64_t drop_wait = -1;
  bool swap_fragments = false;  // mma.sync gets its A registers 1 and 2 exchanged
};

// Totals over a launch.
struct Counters {
  std::atomic<uint64_t> barriers{0}, waits{0};  // of a block's thread 0, summed over blocks
  std::atomic<uint64_t> mma{0};                 // per warp
  std::atomic<uint64_t> ldmatrix{0};            // 8x8 matrices, per warp
  std::atomic<uint64_t> bank_conflicts{0};      // shared-memory passes of ldmatrix beyond one an 8x8 matrix
  std::atomic<uint64_t> async_bytes{0};         // read from global memory by cp.async
};

}  // namespace fusedres::emulator
