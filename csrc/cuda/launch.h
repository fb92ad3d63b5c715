// What a kernel needs of its launch, stated without CUDA: the .cu launchers and the emulator both serve it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedres::cuda {

struct LaunchShape {
  unsigned grid;  // blocks, in one dimension
  int threads;
  size_t shared_bytes;  // dynamic
};

// A launcher is called as `launch(shape, kernel, problem)` and runs `kernel(problem)`.

// Dynamic shared memory a block may have, by compute capability (major * 10 + minor): CUDA C++ programming guide,
// "Technical Specifications per Compute Capability", less the 1 KiB that the system takes.
constexpr size_t shared_limit(int capability) {
  if (capability >= 90 && capability < 120) return 227 << 10;
  if (capability == 80 || capability == 87) return 163 << 10;
  return capability >= 80 ? 99 << 10 : 64 << 10;
}

}  // namespace fusedres::cuda
