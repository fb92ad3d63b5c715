// The launches of a recorded program, one after another in one call (fusedres/launches.py). It needs nothing of CUDA:
// the driver's cuLaunchKernel comes as an address.
#include <cstdint>

namespace {

// CUDA driver API, "Execution Control".
using CuLaunchKernel = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** params,
                               void** extra);

constexpr int kMostParams = 64;  // MOST_PARAMS in fusedres/launches.py
constexpr int64_t kNoRoot = -1;

struct Header {
  int64_t function, grid[3], threads, shared_bytes, params;
};

// A parameter's bits, or how many bytes it lies behind the start of a root.
struct Param {
  int64_t root, value;
};

}  // namespace

// Launches `count` kernels described by `words`: each a Header, then its Params. `roots`: the tensors' addresses.
// Returns the driver's first error, 0 without.
extern "C" __attribute__((visibility("default"))) int fusedres_launch(uint64_t launch, const int64_t* words,
                                                                      int64_t count, const uint64_t* roots,
                                                                      uint64_t stream) {
  for (int64_t i = 0; i < count; ++i) {
    const auto& header = *reinterpret_cast<const Header*>(words);
    words += sizeof(Header) / sizeof(int64_t);
    uint64_t values[kMostParams];
    void* params[kMostParams];
    for (int64_t j = 0; j < header.params; ++j, words += sizeof(Param) / sizeof(int64_t)) {
      const auto& param = *reinterpret_cast<const Param*>(words);
      values[j] = static_cast<uint64_t>(param.value) + (param.root == kNoRoot ? 0 : roots[param.root]);
      params[j] = &values[j];
    }
    const int status = reinterpret_cast<CuLaunchKernel>(launch)(
        reinterpret_cast<void*>(header.function), static_cast<unsigned>(header.grid[0]),
        static_cast<unsigned>(header.grid[1]), static_cast<unsigned>(header.grid[2]),
        static_cast<unsigned>(header.threads), 1, 1, static_cast<unsigned>(header.shared_bytes),
        reinterpret_cast<void*>(stream), params, nullptr);
    if (status != 0) return status;
  }
  return 0;
}
