// A kernel launch on the CPU: every block of the grid, several at once.
#pragma once

#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "emulator/block.h"

namespace fusedres::emulator {

// Runs `kernel()` in every thread of the grid; throws what any of them throws. Blocks share nothing but global memory.
inline void launch(Dim3 grid, Dim3 shape, size_t shared_bytes, const Options& options, Counters& counters,
                   const std::function<void()>& kernel) {
  const uint64_t blocks = grid.count();
  std::atomic<uint64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  GridRacecheck grid_racecheck;
  const auto work = [&] {
    try {
      Block block(grid, shape, shared_bytes, options, counters, grid_racecheck);
      for (uint64_t i = next++; i < blocks; i = next++) {
        // Blocks have no order either.
        const uint64_t at = options.order == Order::reverse ? blocks - 1 - i : i;
        const Dim3 index{static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                         static_cast<unsigned>(at / grid.x / grid.y)};
        block.run(index, kernel);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
      next = blocks;
    }
  };
  std::vector<std::thread> workers;
  for (int i = 1; i < options.workers && static_cast<uint64_t>(i) < blocks; ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace fusedres::emulator
