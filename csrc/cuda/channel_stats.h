// `channel_stats_kernel`: (count, mean, M2) of every channel of a stored activation, read once, and
// `channel_stats_merge_kernel`, which merges what blocks have found.
//
// A thread takes the mean of a few rows from registers and then their squared deviations from it; these moments are
// merged pairwise, within a thread, a block, a warp of the second launch. All are of the distance to the first row: the
// difference of close numbers is exact, and so no mean is too large.
#pragma once

#include "cuda/tail_tile.h"
#include "device/moments.h"

namespace fusedres::cuda {

template <typename T>
struct ChannelStatsProblem {
  const T* x;    // (rows, C)
  float* parts;  // (channel_stats_parts(rows, C), 3, C): count, mean less the first row, M2
  float* stats;  // (3, C): count, mean, M2
  int64_t rows;
  int C;
  TailPlan plan{};
};

constexpr int kRun = 4;  // rows whose moments are taken at once

// Of kSize channels with the same count.
template <int kSize>
struct ChannelMoments {
  float count, mean[kSize], m2[kSize];

  FUSEDRES_DEVICE void merge(const ChannelMoments& other) {
    FUSEDRES_UNROLL
    for (int j = 0; j < kSize; ++j) {
      const device::Moments merged = device::merge({count, mean[j], m2[j]}, {other.count, other.mean[j], other.m2[j]});
      mean[j] = merged.mean;
      m2[j] = merged.m2;
    }
    count += other.count;
  }

  static constexpr int kFloats = device::round_up(1 + 2 * kSize, 4);

  FUSEDRES_DEVICE void pack(float (&to)[kFloats]) const {
    to[0] = count;
    FUSEDRES_UNROLL
    for (int j = 0; j < kFloats - 1; ++j) to[1 + j] = j < kSize ? mean[j] : j < 2 * kSize ? m2[j - kSize] : 0.0f;
  }
  FUSEDRES_DEVICE static ChannelMoments unpacked(const float (&from)[kFloats]) {
    ChannelMoments moments{};
    moments.count = from[0];
    FUSEDRES_UNROLL
    for (int j = 0; j < kSize; ++j) {
      moments.mean[j] = from[1 + j];
      moments.m2[j] = from[1 + kSize + j];
    }
    return moments;
  }
};

// The moments of the thread's rows row0, row0 + down, ..., at most kRun; there is one at least.
template <typename T, int kSize>
FUSEDRES_DEVICE ChannelMoments<kSize> run_moments(const TailThread<kSize>& thread, const T* x, int64_t row0,
                                                  const float (&first)[kSize]) {
  Packed<T, kSize> packed[kRun];
  ChannelMoments<kSize> run{};
  FUSEDRES_UNROLL
  for (int i = 0; i < kRun; ++i) {
    const int64_t row = row0 + i * thread.down;
    packed[i] = thread.load(x, row);
    run.count += row < thread.end ? 1.0f : 0.0f;
  }
  const auto for_each_value = [&](const auto& visit) {
    FUSEDRES_UNROLL
    for (int i = 0; i < kRun; ++i) {
      float value[kSize];
      packed[i].unpack(value);
      FUSEDRES_UNROLL
      for (int j = 0; j < kSize; ++j) {
        if (row0 + i * thread.down < thread.end) visit(j, value[j] - first[j]);
      }
    }
  };
  const float share = 1.0f / run.count;
  for_each_value([&](int j, float value) { run.mean[j] += value; });
  FUSEDRES_UNROLL
  for (int j = 0; j < kSize; ++j) run.mean[j] *= share;
  for_each_value([&](int j, float value) { run.m2[j] += (value - run.mean[j]) * (value - run.mean[j]); });
  return run;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kTailThreads, kTailBlocks)
    channel_stats_kernel(const ChannelStatsProblem<T> problem) {
  using Moments = ChannelMoments<kSize>;
  const auto thread = TailThread<kSize>::of(problem.plan, problem.rows, problem.C);
  device::SharedArena arena;
  float* scratch = arena.take<float>(merge_floats(Moments::kFloats));
  float first[kSize], packed[Moments::kFloats];
  device::load_floats(problem.x + thread.channel, thread.channel < problem.C ? kSize : 0, 0.0f, first);
  Moments moments{};
  for (int64_t row0 = thread.row; row0 < thread.end; row0 += kRun * thread.down) {
    moments.merge(run_moments(thread, problem.x, row0, first));
  }
  moments.pack(packed);
  merge_down(problem.plan, packed, scratch, [](auto& mine, const auto& other) {
    Moments merged = Moments::unpacked(mine);
    merged.merge(Moments::unpacked(other));
    merged.pack(mine);
  });
  if (static_cast<int>(threadIdx.x) >= problem.plan.across()) return;
  moments = Moments::unpacked(packed);
  float count[kSize];
  FUSEDRES_UNROLL
  for (int j = 0; j < kSize; ++j) count[j] = moments.count;
  thread.store_channels(problem.parts, thread.part * 3, count);
  thread.store_channels(problem.parts, thread.part * 3 + 1, moments.mean);
  thread.store_channels(problem.parts, thread.part * 3 + 2, moments.m2);
}

template <typename T>
__global__ void __launch_bounds__(kTailThreads, kTailBlocks)
    channel_stats_merge_kernel(const ChannelStatsProblem<T> problem) {
  const MergeThread thread = MergeThread::of(problem.C);
  if (thread.valid <= 0) return;
  device::Moments moments[kMergeChannels] = {};
  thread.for_each_part<3>(problem.parts, static_cast<int>(problem.plan.parts), [&](auto& part) {
    FUSEDRES_UNROLL
    for (int j = 0; j < kMergeChannels; ++j) moments[j] = merge(moments[j], {part[0][j], part[1][j], part[2][j]});
  });
  float count[kMergeChannels], mean[kMergeChannels] = {}, m2[kMergeChannels];
  if (problem.rows > 0) device::load_floats(problem.x + thread.channel, thread.valid, 0.0f, mean);
  FUSEDRES_UNROLL
  for (int j = 0; j < kMergeChannels; ++j) {
    const device::Moments all = device::warp_merge(moments[j]);
    count[j] = all.count;
    mean[j] += all.mean;
    m2[j] = all.m2;
  }
  if (device::lane_index() != 0) return;
  thread.store_channels(problem.stats, 0, count);
  thread.store_channels(problem.stats, 1, mean);
  thread.store_channels(problem.stats, 2, m2);
}

// How many parts a launch leaves moments of.
template <typename T>
int64_t channel_stats_parts(int64_t rows, int C) {
  return sum_parts<T>(rows, C, kRun);
}

// Without rows all is zero; without channels nothing is launched.
template <typename T, typename Launch>
void channel_stats(const ChannelStatsProblem<T>& problem, Launch&& launch) {
  launch_sum<T>(
      problem, kRun, [](auto width) { return ChannelMoments<width.value>::kFloats; },
      [](auto width) { return channel_stats_kernel<T, width.value>; }, channel_stats_merge_kernel<T>, launch);
}

}  // namespace fusedres::cuda
