// Small kernels that put the emulator itself to the test, some with a fault on purpose.
#include "probes.h"

#include <pybind11/stl.h>

#include "device/async_copy.h"
#include "device/matrix.h"
#include "device/moments.h"
#include "device/vector.h"

namespace py = pybind11;
using namespace fusedres;
using namespace fusedres::device;

namespace {

using probes::options;

template <typename Kernel>
void run(unsigned blocks, unsigned threads, size_t shared, const std::string& order, uint64_t seed,
         const Kernel& kernel) {
  probes::run(blocks, threads, shared, options(order, seed), kernel);
}

using Words = std::vector<uint32_t>;

// Lane l holds registers a[4l..], b[2l..], c[4l..] and gets d[4l..].
std::vector<float> mma(const std::string& dtype, const Words& a, const Words& b, std::vector<float> c) {
  run(1, 32, 0, "forward", 0, [&] {
    const int lane = lane_index();
    float d[4];
    uint32_t fa[4], fb[2];
    memcpy(d, &c[lane * 4], 16);
    memcpy(fa, &a[lane * 4], 16);
    memcpy(fb, &b[lane * 2], 8);
    if (dtype == "float16") {
      multiply_add<half>(d, fa, fb);
    } else {
      multiply_add<bfloat16>(d, fa, fb);
    }
    memcpy(&c[lane * 4], d, 16);
  });
  return c;
}

// `matrices`: four 8x8 matrices row by row, two elements a word; lane l gets four registers, out[4l..].
Words ldmatrix(const Words& matrices, bool transposed) {
  Words out(128);
  run(1, 32, 512, "reverse", 0, [&] {
    uint32_t* shared = SharedArena().take<uint32_t>(128);
    const int lane = lane_index();
    for (int i = 0; i < 4; ++i) shared[lane * 4 + i] = matrices[lane * 4 + i];
    __syncthreads();
    uint32_t registers[4];
    if (transposed) {
      load_matrices_transposed(registers, shared + lane * 4);
    } else {
      load_matrices(registers, shared + lane * 4);
    }
    memcpy(&out[lane * 4], registers, 16);
  });
  return out;
}

// Each thread writes its place and reads its neighbour's, with or without the barrier between.
std::vector<float> neighbours(bool barrier, const std::string& order, uint64_t seed) {
  std::vector<float> out(64);
  run(1, 64, 64 * 4, order, seed, [&] {
    float* shared = SharedArena().take<float>(64);
    const int i = threadIdx.x;
    shared[i] = static_cast<float>(i);
    if (barrier) __syncthreads();
    out[i] = shared[(i + 1) % 64];
  });
  return out;
}

// Sums 16 floats that cp.async brings, with or without the wait.
float async_sum(bool wait) {
  alignas(16) float source[16];
  for (int i = 0; i < 16; ++i) source[i] = static_cast<float>(i);
  float sum = 0;
  run(1, 1, 128, "forward", 0, [&] {
    float* shared = SharedArena().take<float>(16);
    for (int i = 0; i < 16; i += 4) copy_async(shared + i, source + i, true);
    commit_copies();
    if (wait) wait_copies<0>();
    for (int i = 0; i < 16; ++i) sum += shared[i];
    wait_copies<0>();
  });
  return sum;
}

// (in the group waited for, in the group not waited for, beyond the valid part): what shared memory holds.
std::vector<float> async_groups() {
  alignas(16) const float source[4] = {1, 2, 3, 4};
  std::vector<float> seen(3);
  run(1, 1, 3 * 128, "forward", 0, [&] {
    SharedArena arena;
    float *first = arena.take<float>(4), *second = arena.take<float>(4), *third = arena.take<float>(4);
    copy_async(first, source, true);
    copy_async(third, source, false);
    commit_copies();
    copy_async(second, source, true);
    commit_copies();
    wait_copies<1>();
    seen = {first[0], second[0], third[0]};
    wait_copies<0>();
  });
  return seen;
}

// Reads element `index` of a tile of 33 floats that another tile follows.
float read_tile(int index) {
  float seen = 0;
  run(1, 1, 1024, "forward", 0, [&] {
    SharedArena arena;
    float *tile = arena.take<float>(33), *next = arena.take<float>(32);
    for (int i = 0; i < 32; ++i) tile[i] = next[i] = 1.0f;
    tile[32] = 1.0f;
    seen = *(static_cast<volatile float*>(tile) + index);
  });
  return seen;
}

void take_shared(int asked, size_t launched_with) {
  run(1, 1, launched_with, "forward", 0, [&] { SharedArena().take<unsigned char>(asked); });
}

void unfinished_copy() {
  alignas(16) const float source[4] = {};
  run(1, 1, 128, "forward", 0, [&] {
    copy_async(SharedArena().take<float>(4), source, true);
    commit_copies();
  });
}

void misaligned_copy() {
  alignas(16) const float source[8] = {};
  run(1, 1, 128, "forward", 0, [&] { copy_async(SharedArena().take<float>(4), source + 1, true); });
}

// Only half of a warp comes to a shuffle of the whole warp.
void divergent_shuffle() {
  run(1, 32, 0, "forward", 0, [&] {
    if (threadIdx.x < 16) shuffle_xor(1.0f, 1);
    __syncthreads();
  });
}

void different_collectives() {
  run(1, 32, 0, "forward", 0, [&] {
    if (threadIdx.x < 16) {
      shuffle_xor(1.0f, 1);
    } else {
      vote_any(true);
    }
  });
}

// Warp-wide results as lane l sees them: xor 5, down 3, from 7, ballot of odd lanes, sum, half a warp's xor 1.
std::vector<std::vector<int>> shuffles(const std::string& order, uint64_t seed) {
  std::vector<std::vector<int>> out(32);
  run(1, 32, 0, order, seed, [&] {
    const int lane = lane_index();
    const int by_xor = shuffle_xor(lane, 5), by_down = shuffle_down(lane, 3), from = shuffle_from(lane, 7);
    const auto votes = static_cast<int>(vote_ballot(lane % 2 == 1));
    const int in_half = lane < 16 ? shuffle_xor(lane, 1, 0xffffu) : shuffle_xor(-lane, 1, 0xffff0000u);
    out[lane] = {by_xor, by_down, from, votes, warp_sum(lane), in_half};
  });
  return out;
}

// A producer warp hands 32 numbers to a consumer warp by named barriers, ten times, through one buffer.
std::vector<int> produce_consume(const std::string& order, uint64_t seed) {
  std::vector<int> out(320);
  run(1, 64, 128, order, seed, [&] {
    int* buffer = SharedArena().take<int>(32);
    const int lane = lane_index();
    for (int round = 0; round < 10; ++round) {
      if (warp_index() == 0) {
        if (round > 0) barrier_sync(2, 64);
        buffer[lane] = round * 32 + lane;
        barrier_arrive(1, 64);
      } else {
        barrier_sync(1, 64);
        out[round * 32 + lane] = buffer[31 - lane];
        if (round < 9) barrier_arrive(2, 64);
      }
    }
  });
  return out;
}

// Every block adds its threads up in a static shared variable; the last block to finish says so.
std::vector<int> atomics(int blocks, const std::string& order, uint64_t seed) {
  std::vector<int> sums(blocks);
  unsigned finished = 0;
  int last = 0;
  emulator::Options chosen = options(order, seed);
  chosen.workers = 2;
  emulator::Counters counters;
  emulator::launch({static_cast<unsigned>(blocks)}, {64}, 0, chosen, counters, [&] {
    FUSEDRES_SHARED(int, sum);
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, static_cast<int>(threadIdx.x));
    __syncthreads();
    if (threadIdx.x == 0) {
      sums[blockIdx.x] = sum;
      __threadfence();
      if (atomicInc(&finished, blocks - 1) == static_cast<unsigned>(blocks) - 1) last += 1;
    }
  });
  sums.push_back(last);
  return sums;
}

// (a static shared variable, dynamic shared memory) before anything is written.
std::vector<float> untouched() {
  std::vector<float> seen(2);
  run(1, 1, 128, "forward", 0, [&] {
    FUSEDRES_SHARED(float, variable);
    seen = {variable, *SharedArena().take<float>(1)};
  });
  return seen;
}

std::vector<float> warp_moments(const std::vector<float>& values) {
  std::vector<float> out(3);
  run(1, 32, 0, "seeded", 3, [&] {
    Moments mine = Moments::none();
    for (size_t i = threadIdx.x; i < values.size(); i += 32) mine.add(values[i]);
    mine = warp_merge(mine);
    if (threadIdx.x == 0) out = {mine.count, mine.mean, mine.m2};
  });
  return out;
}

// The bits of floats rounded to a 16-bit type, and the floats of all 65536 patterns.
std::vector<int> round_to(const std::string& dtype, const std::vector<float>& values) {
  std::vector<int> out;
  for (const float value : values) {
    out.push_back(dtype == "float16" ? from_float<half>(value).bits : from_float<bfloat16>(value).bits);
  }
  return out;
}

std::vector<float> all_values(const std::string& dtype) {
  std::vector<float> out;
  for (int bits = 0; bits < 65536; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    out.push_back(dtype == "float16" ? to_float(half{pattern}) : to_float(bfloat16{pattern}));
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(emulator_probes, module) {
  module.def("mma", &mma);
  module.def("ldmatrix", &ldmatrix);
  module.def("neighbours", &neighbours);
  module.def("async_sum", &async_sum);
  module.def("async_groups", &async_groups);
  module.def("read_tile", &read_tile);
  module.def("take_shared", &take_shared);
  module.def("unfinished_copy", &unfinished_copy);
  module.def("misaligned_copy", &misaligned_copy);
  module.def("divergent_shuffle", &divergent_shuffle);
  module.def("different_collectives", &different_collectives);
  module.def("shuffles", &shuffles);
  module.def("produce_consume", &produce_consume);
  module.def("atomics", &atomics);
  module.def("untouched", &untouched);
  module.def("warp_moments", &warp_moments);
  module.def("round_to", &round_to);
  module.def("all_values", &all_values);
  probes::bind_races(module);
}
