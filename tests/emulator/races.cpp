// Kernels of two warps with and without a hazard, for the race detector.
#include <pybind11/stl.h>

#include <functional>
#include <map>

#include "device/async_copy.h"
#include "device/grid.h"
#include "device/shared.h"
#include "device/vector.h"
#include "device/warp.h"
#include "probes.h"

namespace fusedres::probes {
namespace {

using namespace device;

constexpr int kThreads = 64;

int thread() { return static_cast<int>(threadIdx.x); }
int neighbour() { return (thread() + 1) % kThreads; }
int neighbour_in_warp() { return warp_index() * kWarp + (lane_index() + 1) % kWarp; }

alignas(16) const float kSource[4 * kThreads] = {};

// Each is given 4 * kThreads floats of shared memory that thread i has written at 4 * i and following, and a barrier.
using Case = std::function<void(const SharedArray<float>& shared)>;

const std::map<std::string, Case> kCases = {
    {"barrier",
     [](const auto& shared) {
       shared.store(thread(), 1.0f);
       __syncthreads();
       shared.load(neighbour());
     }},
    {"no barrier",
     [](const auto& shared) {
       shared.store(thread(), 1.0f);
       shared.load(neighbour());
     }},
    {"no barrier behind the readers",
     [](const auto& shared) {
       shared.load(neighbour());
       shared.store(thread(), 1.0f);
     }},
    {"two writers", [](const auto& shared) { shared.store(0, 1.0f); }},
    {"neighbours within four bytes",
     [](const auto& shared) { store_scalar(reinterpret_cast<uint16_t*>(shared.at(0)) + thread(), uint16_t{1}); }},
    {"syncwarp",
     [](const auto& shared) {
       shared.store(thread(), 1.0f);
       __syncwarp();
       shared.load(neighbour_in_warp());
     }},
    {"syncwarp between warps",
     [](const auto& shared) {
       shared.store(thread(), 1.0f);
       __syncwarp();
       shared.load(neighbour());
     }},
    {"syncwarp behind readers of both warps",
     [](const auto& shared) {
       shared.load(0);
       __syncwarp();
       if (thread() == 0) shared.store(0, 1.0f);
     }},
    {"shuffle",
     [](const auto& shared) {
       shared.store(thread(), 1.0f);
       warp_sum(1.0f);
       shared.load(neighbour_in_warp());
     }},
    {"named barrier",
     [](const auto& shared) {
       if (warp_index() == 0) {
         shared.store(thread(), 1.0f);
         barrier_arrive(1, kThreads);
       } else {
         barrier_sync(1, kThreads);
         shared.load(lane_index());
       }
     }},
    {"named barrier the wrong way",
     [](const auto& shared) {
       if (warp_index() == 0) {
         barrier_sync(1, kThreads);
         shared.store(thread(), 1.0f);
       } else {
         barrier_arrive(1, kThreads);
         shared.load(lane_index());
       }
     }},
    {"block_sum, twice",
     [](const auto& shared) {
       block_sum<kThreads>(1.0f, shared.data);
       block_sum<kThreads>(1.0f, shared.data);
     }},
    {"copy",
     [](const auto& shared) {
       copy_async(shared.at(4 * thread()), kSource + 4 * thread(), true);
       commit_copies();
       wait_copies<0>();
       shared.load(4 * thread());
       __syncthreads();
       shared.load(4 * neighbour());
     }},
    {"copy not waited for",
     [](const auto& shared) {
       copy_async(shared.at(4 * thread()), kSource, true);
       commit_copies();
       shared.load(4 * thread());
       wait_copies<0>();
     }},
    {"copy not waited for, behind a barrier",
     [](const auto& shared) {
       copy_async(shared.at(4 * thread()), kSource, true);
       commit_copies();
       __syncthreads();
       shared.load(4 * neighbour());
       wait_copies<0>();
     }},
    {"copy waited for, no barrier",
     [](const auto& shared) {
       copy_async(shared.at(4 * thread()), kSource, true);
       commit_copies();
       wait_copies<0>();
       shared.load(4 * neighbour());
     }},
    {"copy over what others read",
     [](const auto& shared) {
       shared.load(4 * neighbour());
       copy_async(shared.at(4 * thread()), kSource, true);
       commit_copies();
       wait_copies<0>();
     }},
    {"never written",
     [](const auto&) {
       SharedArena arena;
       arena.take<float>(4 * kThreads);
       load_scalar(arena.take<float>(1));
     }},
    {"behind a tile", [](const auto& shared) { load_scalar(shared.data + shared.size); }},
    {"behind a view", [](const auto& shared) { SharedArray<float>{shared.data, 4}.load(4); }},
    {"before a view", [](const auto& shared) { SharedArray<float>{shared.data + 4, 4}.load(-1); }},
    {"row behind a tile",
     [](const auto& shared) { Tile<half>{reinterpret_cast<half*>(shared.data), 64, 1}.pair(1, 0); }},
    {"column behind a tile",
     [](const auto& shared) { Tile<half>{reinterpret_cast<half*>(shared.data), 64, 2}.pair(0, 64); }},
    {"misaligned", [](const auto& shared) { load_vector(shared.data + 1); }},
    {"written around the primitives",
     [](const auto& shared) {
       if (thread() == 0) shared.data[0] = 1.0f;
     }},
    {"atomics",
     [](const auto&) {
       FUSEDRES_SHARED(int, sum);
       atomicAdd(&sum, 1);
     }},
};

void race(const std::string& name, const std::string& order, uint64_t seed) {
  emulator::Options chosen = options(order, seed);
  chosen.racecheck = true;
  run(1, kThreads, 8 * kThreads * sizeof(float), chosen, [&] {
    const SharedArray<float> shared{SharedArena().take<float>(4 * kThreads), 4 * kThreads};
    for (int i = 0; i < 4; ++i) shared.store(4 * thread() + i, 0.0f);
    __syncthreads();
    kCases.at(name)(shared);
  });
}

// What a read around the primitives sees of a 1 that a primitive has written.
float read_around() {
  emulator::Options chosen;
  chosen.racecheck = true;
  float seen = 0.0f;
  run(1, 1, 128, chosen, [&] {
    float* shared = SharedArena().take<float>(1);
    store_scalar(shared, 1.0f);
    seen = *shared;
  });
  return seen;
}

// The first block leaves kThreads numbers for the second, which adds them up.
float hand_over(bool barrier, bool fence, const std::string& order, uint64_t seed) {
  emulator::Options chosen = options(order, seed);
  chosen.racecheck = true;
  float numbers[kThreads] = {}, sum = 0.0f;
  unsigned counters[2] = {};
  run(2, kThreads, 0, chosen, [&] {
    if (take_ticket(counters) == 0) {
      publish(numbers + thread(), 1.0f);
      if (barrier) __syncthreads();
      if (thread() == 0) {
        if (fence) __threadfence();
        atomicAdd(counters + 1, 1u);
      }
    } else {
      wait_for(counters + 1, 1);
      float total = 0.0f;
      for (int i = 0; i < kThreads; ++i) total += load_scalar(numbers + i);
      if (thread() == 0) sum = total;
    }
  });
  return sum;
}

}  // namespace

void bind_races(pybind11::module_& module) {
  module.def("race", &race);
  module.def("read_around", &read_around);
  module.def("hand_over", &hand_over);
}

}  // namespace fusedres::probes
