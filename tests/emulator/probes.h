// How the probes run a kernel under the emulator.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "emulator/launch.h"

namespace fusedres::probes {

inline emulator::Options options(const std::string& order, uint64_t seed) {
  emulator::Options result;
  result.order = order == "reverse"  ? emulator::Order::reverse
                 : order == "seeded" ? emulator::Order::seeded
                                     : emulator::Order::forward;
  result.seed = seed;
  return result;
}

// Runs kernel() in `threads` threads of `blocks` blocks.
template <typename Kernel>
void run(unsigned blocks, unsigned threads, size_t shared, const emulator::Options& options, const Kernel& kernel) {
  emulator::Counters counters;
  emulator::launch({blocks}, {threads}, shared, options, counters, kernel);
}

void bind_races(pybind11::module_& module);

}  // namespace fusedres::probes
