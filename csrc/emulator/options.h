// How a kernel is emulated: the order of its threads, faults to plant, and what is counted while it runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace fusedres::emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// forward, reverse: the first (last) warp that can run does, up to its next block barrier. seeded: any, a bit each.
enum class Order { forward, reverse, seeded };

// A call in the machine code, by the address it returns to: a function that is inlined twice makes two.
using Call = uintptr_t;

struct Options {
  Order order = Order::forward;
  uint64_t seed = 0;
  int workers = 1;         // blocks that run at once
  double patience = 60.0;  // seconds that a block waits for another before it is an error
  bool racecheck = false;  // every access is checked by emulator/racecheck.h, calls are listed in Counters

  // Faults, planted in every thread alike.
  Call drop = 0;                             // this barrier, wait or fence is left out, as if the source lacked it
  Call shift = 0;                            // this access to a view is one row or element further on (with racecheck)
  std::pair<int, int> swap_registers{0, 0};  // mma.sync gets these exchanged: 0-3 of A, 4-5 of B, 6-9 of D
};

// Totals over a launch.
struct Counters {
  std::atomic<uint64_t> barriers{0}, waits{0};  // of a block's thread 0, summed over blocks
  std::atomic<uint64_t> mma{0};                 // per warp
  std::atomic<uint64_t> ldmatrix{0};            // 8x8 matrices, per warp
  std::atomic<uint64_t> bank_conflicts{0};      // shared-memory passes of ldmatrix beyond one an 8x8 matrix
  std::atomic<uint64_t> async_bytes{0};         // read from global memory by cp.async

  std::mutex mutex;
  std::map<Call, std::string> calls;  // "barrier", "wait", "fence" or "view", where there is a racecheck
};

}  // namespace fusedres::emulator
