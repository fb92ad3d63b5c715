// How the kernels of the tails share an activation out, and how sums over its pixels are taken.
//
// An activation is a matrix here: rows = N*H*W pixels of C channels. A thread has kSize channels, 16 bytes where C is a
// multiple of that many and else one, and goes down the rows. Who adds what up follows from sizes alone and nothing is
// added atomically: sums are the same bits in every run.
#pragma once

#include "cuda/launch.h"
#include "device/shared.h"
#include "device/vector.h"
#include "device/warp.h"

namespace fusedres::cuda {

constexpr int kTailThreads = 256, kTailWarps = kTailThreads / device::kWarp;
constexpr int kTailBlocks = 2;   // on an SM at least, so that enough bytes are on their way
constexpr int kMostAcross = 32;  // threads beside each other on the channels of a pixel
constexpr int kSumBlocks = 512;  // that share a sum, about what the largest GPUs keep in flight

// Calls function(width), `width.value` the channels of a thread.
template <typename T, typename Function>
auto with_width(int C, const Function& function) {
  constexpr int kWide = device::Vector<T>::kSize;
  if (C % kWide == 0) return function(std::integral_constant<int, kWide>{});
  return function(std::integral_constant<int, 1>{});
}

// kSize elements of T in as few registers as they fill; by itself each 16-bit element may be given one.
template <typename T, int kSize>
struct Packed {
  using Word = std::conditional_t<kSize * sizeof(T) % 4 == 0, uint32_t, uint16_t>;
  device::Vector<Word, kSize * sizeof(T) / sizeof(Word)> words;

  FUSEDRES_DEVICE void unpack(float (&out)[kSize]) const {
    T elements[kSize];
    memcpy(elements, &words, sizeof(elements));
    FUSEDRES_UNROLL
    for (int j = 0; j < kSize; ++j) out[j] = device::to_float(elements[j]);
  }
};

// The blocks of a launch: `columns` beside each other, and `parts` down the rows, of rows_each rows.
struct TailPlan {
  int shift;  // 2^shift threads of a block lie beside each other, the others down the rows
  int columns;
  int64_t rows_each, parts;

  FUSEDRES_HOST_DEVICE int across() const { return 1 << shift; }
  FUSEDRES_HOST_DEVICE int down() const { return kTailThreads >> shift; }
  int64_t blocks() const { return parts * columns; }
};

// Each thread of a block has a multiple of `ahead` rows; there are about `most` blocks at most where that is not 0.
inline TailPlan tail_plan(int64_t rows, int C, int width, int ahead, int most) {
  const int chunks = device::ceil_div(C, width);
  TailPlan plan{0, 0, 0, 0};
  while (plan.across() < chunks && plan.across() < kMostAcross) ++plan.shift;
  plan.columns = device::ceil_div(chunks, plan.across());
  plan.rows_each = static_cast<int64_t>(plan.down()) * ahead;
  if (rows == 0 || C == 0) return plan;
  if (most > 0) {
    const int64_t parts = most > plan.columns ? most / plan.columns : 1;
    plan.rows_each = device::round_up(device::ceil_div(rows, parts), plan.rows_each);
  }
  plan.parts = device::ceil_div(rows, plan.rows_each);
  return plan;
}

// What a thread has of the activation: kSize channels from `channel` on, of every down-th row from `row` to `end`.
template <int kSize>
struct TailThread {
  int C, part, channel, down;
  int64_t row, end;  // no rows where there are no channels

  FUSEDRES_DEVICE static TailThread of(const TailPlan& plan, int64_t rows, int C) {
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    const int part = block / plan.columns, column = block % plan.columns * plan.across() + thread % plan.across();
    const int64_t first = part * plan.rows_each, end = first + plan.rows_each < rows ? first + plan.rows_each : rows;
    return {C, part, column * kSize, plan.down(), first + (thread >> plan.shift), column * kSize < C ? end : 0};
  }

  // Its channels of `at`, a row of a tensor (rows, C); zeros beyond its rows.
  template <typename T>
  FUSEDRES_DEVICE Packed<T, kSize> load(const T* from, int64_t at) const {
    using Word = typename Packed<T, kSize>::Word;
    constexpr int kWords = kSize * sizeof(T) / sizeof(Word);
    if (at >= end) return {};
    return {device::load_vector<Word, kWords>(reinterpret_cast<const Word*>(from + at * C + channel))};
  }
  template <typename T>
  FUSEDRES_DEVICE void store(T* to, int64_t at, const float (&values)[kSize]) const {
    if (at >= end) return;
    device::Vector<T, kSize> vector;
    FUSEDRES_UNROLL
    for (int j = 0; j < kSize; ++j) vector.value[j] = device::from_float<T>(values[j]);
    device::store_vector(to + at * C + channel, vector);
  }

  // Its channels of vector `index` of a tensor (vectors, C); zeros beyond the channels.
  FUSEDRES_DEVICE void load_channels(const float* vectors, int index, float (&out)[kSize]) const {
    device::load_floats(vectors + static_cast<int64_t>(index) * C + channel, channel < C ? kSize : 0, 0.0f, out);
  }
  FUSEDRES_DEVICE void store_channels(float* vectors, int index, const float (&values)[kSize]) const {
    device::store_floats(vectors + static_cast<int64_t>(index) * C + channel, channel < C ? kSize : 0, values);
  }
};

// Of the values that a block's threads have for the same channels, all merged into those of the first of them, by a
// tree that halves the rows: merge(mine, other). `scratch` has merge_floats(kCount) floats.
template <int kCount, typename Merge>
FUSEDRES_DEVICE void merge_down(const TailPlan& plan, float (&mine)[kCount], float* scratch, const Merge& merge) {
  static_assert(kCount % 4 == 0, "vectors of 16 bytes");
  const int thread = static_cast<int>(threadIdx.x);
  for (int threads = kTailThreads / 2; threads >= plan.across(); threads /= 2) {
    if (threads < kTailThreads / 2) __syncthreads();  // `scratch` was read
    if (thread >= threads && thread < 2 * threads) {
      FUSEDRES_UNROLL
      for (int i = 0; i < kCount; i += 4) {
        const device::Vector<float> part{mine[i], mine[i + 1], mine[i + 2], mine[i + 3]};
        device::store_vector(scratch + (i / 4 * threads + thread - threads) * 4, part);
      }
    }
    __syncthreads();
    if (thread < threads) {
      float other[kCount];
      FUSEDRES_UNROLL
      for (int i = 0; i < kCount; i += 4) {
        const device::Vector<float> part = device::load_vector(scratch + (i / 4 * threads + thread) * 4);
        FUSEDRES_UNROLL
        for (int j = 0; j < 4; ++j) other[i + j] = part.value[j];
      }
      merge(mine, other);
    }
  }
}

FUSEDRES_HOST_DEVICE constexpr int merge_floats(int count) { return kTailThreads / 2 * count; }

// The second step of a reduction: each warp merges kMergeChannels channels, each of its lanes every 32nd part.
constexpr int kMergeChannels = 4;

inline LaunchShape merge_shape(int C) {
  return {static_cast<unsigned>(device::ceil_div(C, kTailWarps * kMergeChannels)), kTailThreads, 0};
}

struct MergeThread {
  int C, channel, valid;

  FUSEDRES_DEVICE static MergeThread of(int C) {
    const int warp = static_cast<int>(blockIdx.x) * kTailWarps + device::warp_index();
    const int channel = warp * kMergeChannels, left = C - channel;
    return {C, channel, left < kMergeChannels ? left : kMergeChannels};
  }

  // visit(values) for the lane's parts in order, of `parts` parts of kVectors vectors each; zeros beyond the last.
  template <int kVectors, typename Visit>
  FUSEDRES_DEVICE void for_each_part(const float* from, int parts, const Visit& visit) const {
    constexpr int kAhead = 4;
    for (int part0 = device::lane_index(); part0 < parts; part0 += kAhead * device::kWarp) {
      float values[kAhead][kVectors][kMergeChannels];
      FUSEDRES_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int part = part0 + i * device::kWarp;
        FUSEDRES_UNROLL
        for (int k = 0; k < kVectors; ++k) {
          const int64_t vector = static_cast<int64_t>(part) * kVectors + k;
          device::load_floats(from + vector * C + channel, part < parts ? valid : 0, 0.0f, values[i][k]);
        }
      }
      FUSEDRES_UNROLL
      for (int i = 0; i < kAhead; ++i) visit(values[i]);
    }
  }

  FUSEDRES_DEVICE void load_channels(const float* vectors, int index, float (&out)[kMergeChannels]) const {
    device::load_floats(vectors + static_cast<int64_t>(index) * C + channel, valid, 0.0f, out);
  }
  FUSEDRES_DEVICE void store_channels(float* vectors, int index, const float (&values)[kMergeChannels]) const {
    device::store_floats(vectors + static_cast<int64_t>(index) * C + channel, valid, values);
  }
};

// One launch over all rows, each thread `ahead` of them: of kernel(width), with `width.value` the channels of a thread.
// False, and no launch, where a grid cannot have as many blocks.
template <typename T, typename Problem, typename Kernel, typename Launch>
bool launch_pass(Problem problem, int ahead, const Kernel& kernel, Launch&& launch) {
  return with_width<T>(problem.C, [&](auto width) {
    problem.plan = tail_plan(problem.rows, problem.C, width.value, ahead, 0);
    if (problem.plan.blocks() > INT32_MAX) return false;
    const LaunchShape shape{static_cast<unsigned>(problem.plan.blocks()), kTailThreads, 0};
    if (shape.grid > 0) launch(shape, kernel(width), problem);
    return true;
  });
}

// How many parts the first launch of a sum leaves.
template <typename T>
int64_t sum_parts(int64_t rows, int C, int ahead) {
  return with_width<T>(C, [&](auto width) { return tail_plan(rows, C, width.value, ahead, kSumBlocks).parts; });
}

// The two launches of a sum: of kernel(width), whose threads merge floats(width) floats each, where there are rows, and
// of `merge`, where there are channels.
template <typename T, typename Problem, typename Floats, typename Kernel, typename Merge, typename Launch>
void launch_sum(Problem problem, int ahead, const Floats& floats, const Kernel& kernel, Merge merge, Launch&& launch) {
  if (problem.C == 0) return;
  with_width<T>(problem.C, [&](auto width) {
    problem.plan = tail_plan(problem.rows, problem.C, width.value, ahead, kSumBlocks);
    const LaunchShape shape{static_cast<unsigned>(problem.plan.blocks()), kTailThreads,
                            sizeof(float) * merge_floats(floats(width))};
    if (shape.grid > 0) launch(shape, kernel(width), problem);
  });
  launch(merge_shape(problem.C), merge, problem);
}

}  // namespace fusedres::cuda
