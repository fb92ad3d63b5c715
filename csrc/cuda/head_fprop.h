// `head_fprop_kernel`: global average pool and fully connected layer in one launch.
//
// Every output needs the means of all channels, so blocks work for one another: the first pool, a share of the channels
// of some images each, and leave the means in memory; the others multiply, a tile of images by some outputs each, once
// all means of their images are there. Until then they load weights. Roles go by the order in which blocks begin, so
// that nobody waits for a block that has no room to run.
//
// x is read once. The eight warps of a block share gemm_k = C, 16 channels a warp in turn, and their accumulators are
// added in a fixed order: even where there are few outputs there are many blocks, and every sum has one order.
#pragma once

#include <algorithm>

#include "cuda/block_tile.h"
#include "cuda/launch.h"
#include "device/grid.h"

namespace fusedres::cuda {

// C is a multiple of 8; x, w and pooled are aligned to 16 bytes.
template <typename T>
struct HeadProblem {
  const T* x;          // (N, S, C), S pixels
  const T* w;          // (F, C)
  const T* bias;       // (F,), or null
  T* pooled;           // (N, C), for the means
  unsigned* counters;  // head_counters(N), all zero: tickets, then the shares pooled of each tile of images
  T* y;                // (N, F)
  int N, S, C, F;
};

constexpr int kPoolChannels = device::kWarp * device::kChunk;  // of a share
constexpr int kPoolAhead = 8;                                  // pixels that a thread loads at once
constexpr int kPoolBlocks = 512;                               // from which on a share has more than one image

template <int kM16_, int kN8_, int kStages_>
struct HeadTile {
  static constexpr int kM16 = kM16_, kN8 = kN8_, kStages = kStages_;
  static constexpr int kImages = 16 * kM16, kOutputs = 8 * kN8;
  static constexpr int kStep = 16 * kWarps;  // gemm_k at a time
  static constexpr int kSlot = (kImages + kOutputs) * kStep;

  // The ring of operands, then in its place the warps' sums; or the sums of pixels.
  static constexpr int kSharedBytes =
      std::max({2 * kStages * kSlot, 4 * kWarps * kImages * kOutputs, 4 * 2 * kWarps * kPoolChannels});
};

// How the blocks of a launch are shared out.
struct HeadPlan {
  int images_a_share;  // a power of two, at most a tile's images
  int channel_shares, pool_blocks, output_tiles, blocks;
};

template <typename Shape>
FUSEDRES_HOST_DEVICE HeadPlan head_plan(int N, int C, int F) {
  HeadPlan plan{1, device::ceil_div(C, kPoolChannels), 0, device::ceil_div(F, Shape::kOutputs), 0};
  const int64_t wanted = static_cast<int64_t>(N) * plan.channel_shares / kPoolBlocks;
  while (plan.images_a_share < Shape::kImages && plan.images_a_share * 2 <= wanted) plan.images_a_share *= 2;
  plan.pool_blocks = device::ceil_div(N, plan.images_a_share) * plan.channel_shares;
  plan.blocks = plan.pool_blocks + device::ceil_div(N, Shape::kImages) * plan.output_tiles;
  return plan;
}

// The means of kPoolChannels channels of some images: a warp adds up every eighth pixel, then one thread a channel the
// warps' sums.
template <typename T>
FUSEDRES_DEVICE void pool_share(const HeadProblem<T>& problem, float* sums, int image, int images, int c0) {
  const int C = problem.C, S = problem.S, lane = device::lane_index(), warp = device::warp_index();
  const int c = c0 + lane * device::kChunk, channel = c0 + static_cast<int>(threadIdx.x);
  for (int i = 0; i < images; ++i) {
    const T* pixels = problem.x + static_cast<int64_t>(image + i) * S * C + c;
    float sum[device::kChunk] = {};
    for (int p0 = warp; c < C && p0 < S; p0 += kPoolAhead * kWarps) {
      device::Vector<T> loaded[kPoolAhead] = {};
      FUSEDRES_UNROLL
      for (int j = 0; j < kPoolAhead; ++j) {
        const int p = p0 + j * kWarps;
        if (p < S) loaded[j] = device::load_vector(pixels + static_cast<int64_t>(p) * C);
      }
      FUSEDRES_UNROLL
      for (int j = 0; j < kPoolAhead; ++j) {
        FUSEDRES_UNROLL
        for (int k = 0; k < device::kChunk; ++k) sum[k] += device::to_float(loaded[j].value[k]);
      }
    }
    // One of two, so that one barrier an image is enough.
    const device::SharedArray<float> mine{sums + i % 2 * kWarps * kPoolChannels, kWarps * kPoolChannels};
    for (int k = 0; k < device::kChunk; k += 4) {
      const device::Vector<float> part{sum[k], sum[k + 1], sum[k + 2], sum[k + 3]};
      device::store_vector(mine.at(warp * kPoolChannels + lane * device::kChunk + k), part);
    }
    __syncthreads();
    if (channel >= C) continue;
    float total = 0.0f;
    FUSEDRES_UNROLL
    for (int w = 0; w < kWarps; ++w) total += mine.load(w * kPoolChannels + threadIdx.x);
    device::publish(problem.pooled + static_cast<int64_t>(image + i) * C + channel, device::from_float<T>(total / S));
  }
}

// Rows row0 and following of `from` (rows, C), 128 columns from c0; zeros beyond either.
template <int kRows, int kStep, typename T>
FUSEDRES_DEVICE void load_head_rows(const Tile<T>& tile, const T* from, int rows, int C, int row0, int c0) {
  constexpr int kChunks = kStep / device::kChunk;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, c = c0 + chunk * device::kChunk;
    const bool inside = row0 + row < rows && c < C;
    device::copy_async(tile.chunk(row, chunk), inside ? from + static_cast<int64_t>(row0 + row) * C + c : from, inside);
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, 2) head_fprop_kernel(const HeadProblem<T> problem) {
  constexpr int kImages = Shape::kImages, kOutputs = Shape::kOutputs, kStep = Shape::kStep, kStages = Shape::kStages;
  const int N = problem.N, C = problem.C, F = problem.F;
  const HeadPlan plan = head_plan<Shape>(N, C, F);
  device::SharedArena arena;
  float* sums = reinterpret_cast<float*>(arena.take<unsigned char>(Shape::kSharedBytes));
  T* ring = reinterpret_cast<T*>(sums);
  const int ticket = static_cast<int>(device::take_ticket(problem.counters));

  if (ticket < plan.pool_blocks) {
    const int image = ticket / plan.channel_shares * plan.images_a_share;
    const int images = N - image < plan.images_a_share ? N - image : plan.images_a_share;
    pool_share(problem, sums, image, images, ticket % plan.channel_shares * kPoolChannels);
    device::arrive(problem.counters + 1 + image / kImages);
    return;
  }

  const int tile = (ticket - plan.pool_blocks) / plan.output_tiles;
  const int n0 = tile * kImages, f0 = (ticket - plan.pool_blocks) % plan.output_tiles * kOutputs;
  const int images = N - n0 < kImages ? N - n0 : kImages;
  const auto means = [&](int slot) { return Tile<T>{ring + slot * Shape::kSlot, kStep, kImages}; };
  const auto weights = [&](int slot) { return Tile<T>{ring + slot * Shape::kSlot + kImages * kStep, kStep, kOutputs}; };
  const auto load_weights = [&](int step, int slot) {
    load_head_rows<kOutputs, kStep>(weights(slot), problem.w, F, C, f0, step * kStep);
  };

  const int warp = device::warp_index(), steps = device::ceil_div(C, kStep);
  device::Accumulators<Shape::kM16, Shape::kN8> acc;
  acc.clear();
  device::pipeline<kStages>(
      steps,
      [&](int step, int slot) {
        if (step == 0) {  // weights for as many steps as there is room, then the means
          for (int ahead = 0; ahead < kStages - 1 && ahead < steps; ++ahead) load_weights(ahead, ahead);
          device::wait_for(problem.counters + 1 + tile,
                           device::ceil_div(images, plan.images_a_share) * plan.channel_shares);
        }
        if (step >= kStages - 1) load_weights(step, slot);
        load_head_rows<kImages, kStep>(means(slot), problem.pooled, N, C, n0, step * kStep);
      },
      [&](int, int slot) {
        device::multiply_tiles<T, 1>(
            acc,
            [&](int m, int chunk) { return means(slot).chunk(m * 16 + device::lane_index() % 16, warp * 2 + chunk); },
            [&](int row, int chunk) { return weights(slot).chunk(row, warp * 2 + chunk); });
      });

  __syncthreads();  // the ring is free
  const device::SharedArray<float> parts{sums, kWarps * kImages * kOutputs};
  acc.for_each_pair([&](int row, int col, float first, float second) {
    const int to = (warp * kImages + row) * kOutputs + col;
    parts.store(to, first);
    parts.store(to + 1, second);
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kImages * kOutputs; i += kThreads) {
    const int n = n0 + i / kOutputs, f = f0 + i % kOutputs;
    if (n >= N || f >= F) continue;
    float total = problem.bias ? device::to_float(problem.bias[f]) : 0.0f;
    FUSEDRES_UNROLL
    for (int w = 0; w < kWarps; ++w) total += parts.load(w * kImages * kOutputs + i);
    problem.y[static_cast<int64_t>(n) * F + f] = device::from_float<T>(total);
  }
}

// What is compiled: for few images many blocks of few outputs, for many fewer blocks that read the weights less often.
using SmallHeadTile = HeadTile<1, 2, 4>;
using LargeHeadTile = HeadTile<4, 4, 3>;
constexpr int kSmallHead = 64;  // most images that the small tile takes

// How many counters a launch needs.
inline int64_t head_counters(int64_t N) { return 1 + device::ceil_div<int64_t>(N, SmallHeadTile::kImages); }

template <typename Shape, typename T, typename Launch>
bool head_fprop_tile(const HeadProblem<T>& problem, size_t shared_limit, Launch&& launch) {
  const int64_t shares = static_cast<int64_t>(problem.N) * device::ceil_div(problem.C, kPoolChannels);
  const int64_t tiles =
      device::ceil_div<int64_t>(problem.N, Shape::kImages) * device::ceil_div(problem.F, Shape::kOutputs);
  if (Shape::kSharedBytes > shared_limit || shares + tiles > INT32_MAX) return false;
  const HeadPlan plan = head_plan<Shape>(problem.N, problem.C, problem.F);
  const LaunchShape shape{static_cast<unsigned>(plan.blocks), kThreads, Shape::kSharedBytes};
  if (problem.N > 0) launch(shape, head_fprop_kernel<T, Shape>, problem);
  return true;
}

// False, and no launch, where `shared_limit` is too small or a size is not served.
template <typename T, typename Launch>
bool head_fprop(const HeadProblem<T>& problem, size_t shared_limit, Launch&& launch) {
  return problem.N <= kSmallHead ? head_fprop_tile<SmallHeadTile>(problem, shared_limit, launch)
                                 : head_fprop_tile<LargeHeadTile>(problem, shared_limit, launch);
}

}  // namespace fusedres::cuda
