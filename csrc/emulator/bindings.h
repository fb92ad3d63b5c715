// What the emulator's Python bindings share: options, counters, and the launcher that kernels are called with.
//
// Tensors come as addresses; the Python side (tests/emulator/emulated.py) has checked their shapes and dtypes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <variant>

#include "cuda/launch.h"
#include "device/scalar.h"
#include "emulator/launch.h"

namespace fusedres::emulator {

using Address = uintptr_t;
using Totals = std::map<std::string, std::variant<uint64_t, std::map<Call, std::string>>>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Totals totals(const Counters& counters, uint64_t launches) {
  return {{"launches", launches},
          {"barriers", counters.barriers},
          {"waits", counters.waits},
          {"mma", counters.mma},
          {"ldmatrix", counters.ldmatrix},
          {"bank_conflicts", counters.bank_conflicts},
          {"async_bytes", counters.async_bytes},
          {"calls", counters.calls}};
}

// Serves as the launcher of csrc/cuda.
struct Launcher {
  const Options& options;
  Counters counters{};
  uint64_t launches = 0;

  template <typename Kernel, typename Problem>
  void operator()(const cuda::LaunchShape& shape, Kernel kernel, const Problem& problem) {
    const pybind11::gil_scoped_release released;
    ++launches;
    try {
      launch({shape.grid}, {static_cast<unsigned>(shape.threads)}, shape.shared_bytes, options, counters,
             [&] { kernel(problem); });
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(pybind11::type_id<Problem>() + ": " + error.what());
    }
  }
};

// Calls function(T{}) for "float16" and "bfloat16". The sanitizers, slow to compile, see float16 alone: the dtype
// changes no address.
template <typename Function>
auto for_dtype(const std::string& dtype, const Function& function) {
  if (dtype == "float16") return function(device::half{});
#ifndef __SANITIZE_ADDRESS__
  if (dtype == "bfloat16") return function(device::bfloat16{});
#endif
  throw std::runtime_error("emulator: no kernel for " + dtype);
}

// The same for the kernels that take "float32" too.
template <typename Function>
auto for_any_dtype(const std::string& dtype, const Function& function) {
#ifndef __SANITIZE_ADDRESS__
  if (dtype == "float32") return function(float{});
#endif
  return for_dtype(dtype, function);
}

void bind_bottleneck(pybind11::module_& module);
void bind_basic_block(pybind11::module_& module);
void bind_stem(pybind11::module_& module);
void bind_head(pybind11::module_& module);
void bind_tails(pybind11::module_& module);

}  // namespace fusedres::emulator
