// `bottleneck_fprop_kernel`: an eval bottleneck in one launch, its two inner activations never leave the chip.
//
// A thread block computes a kTileP x kTileQ tile of the output. conv1 (1x1) runs on the tile and its halo, conv2 (3x3)
// on conv1's output in shared memory, conv3 (1x1) on conv2's; the residual is x itself, or the projection of x,
// accumulated into conv3's accumulators as further gemm_k. BN is folded: weights in T, biases in float32.
//
// The halo is computed again by the neighbour: conv1's arithmetic grows by (tile + halo) / tile, 180/128 for 8x16.
#pragma once

#include "cuda/block_tile.h"
#include "cuda/launch.h"

namespace fusedres::cuda {

// Every channel count is a multiple of 8, every pointer aligned to 16 bytes, P = (H - 1) / stride + 1.
template <typename T>
struct BottleneckProblem {
  const T* x;                          // (N, H, W, C)
  const T *w1, *w2, *w3;               // (F, C), (F, 3, 3, F), (K, F)
  const T* w_shortcut;                 // (K, C), or null: the residual is x
  const float *bias1, *bias2, *bias3;  // (F,), (F,), (K,); bias3 includes the projection's
  T* y;                                // (N, P, Q, K)
  int N, H, W, C, F, K, P, Q;
};

template <int kStride, int kTileP, int kTileQ>
struct BottleneckTile {
  static constexpr int kHaloP = (kTileP - 1) * kStride + 3, kHaloQ = (kTileQ - 1) * kStride + 3;
  static constexpr int kHalo = kHaloP * kHaloQ, kHaloM = device::round_up(kHalo, 64), kOut = kTileP * kTileQ;

  template <typename T>
  static size_t shared_bytes(int F) {
    const size_t width = device::round_up(F, kColumns);
    return sizeof(T) * (Ring<T, kHaloM>::kSlots * Ring<T, kHaloM>::kSlot + (kHalo + kOut) * width);
  }
};

template <typename T, int kStride, int kTileP, int kTileQ>
__global__ void __launch_bounds__(kThreads, 1) bottleneck_fprop_kernel(const BottleneckProblem<T> problem) {
  using Shape = BottleneckTile<kStride, kTileP, kTileQ>;
  constexpr int kHaloM = Shape::kHaloM, kHaloQ = Shape::kHaloQ, kOut = Shape::kOut;
  using HaloGrid = WarpGrid<kHaloM>;
  using OutGrid = WarpGrid<kOut>;
  const int H = problem.H, W = problem.W, C = problem.C, F = problem.F, K = problem.K, P = problem.P, Q = problem.Q;

  device::SharedArena arena;
  const int width = device::round_up(F, kColumns);
  const Ring<T, kHaloM> ring{arena.take<T>(Ring<T, kHaloM>::kSlots * Ring<T, kHaloM>::kSlot)};
  // conv2 reads every kStride-th row of a1: the swizzle follows.
  const Tile<T, kStride - 1> a1{arena.take<T>(Shape::kHalo * width), width, Shape::kHalo};
  const Tile<T> a2{arena.take<T>(kOut * width), width, kOut};

  const TilePosition at = tile_position<kTileP, kTileQ>(P, Q);
  const T* image = problem.x + at.n * H * W * C;
  T* y_image = problem.y + at.n * P * Q * K;

  // conv1 on the tile and its halo. Outside the image lies conv2's padding, which is zero, not relu(bias1).
  const auto halo_pixel = [&](int row) {
    const int h = at.p0 * kStride - 1 + row / kHaloQ, w = at.q0 * kStride - 1 + row % kHaloQ;
    return row < Shape::kHalo && h >= 0 && h < H && w >= 0 && w < W ? h * W + w : -1;
  };
  const PixelRows<kHaloM> halo(halo_pixel);
  for (int n0 = 0; n0 < F; n0 += kColumns) {
    typename HaloGrid::Acc acc;
    acc.clear();
    int rows[HaloGrid::kM16];
    plain_rows<kHaloM>(rows);
    device::pipeline<2>(
        device::ceil_div(C, kDepth),
        [&](int step, int slot) {
          halo.load(ring.activations(slot), image, C, step * kDepth);
          load_weights(ring.weights(slot), problem.w1, F, C, n0, step * kDepth, C - step * kDepth);
        },
        [&](int, int slot) { gemm_step<kHaloM>(acc, ring.activations(slot), rows, 0, 0, ring.weights(slot)); });
    __syncthreads();  // the ring is free
    store_activations<HaloGrid, T>(acc, a1, n0, n0, {problem.bias1, F, true}, [&](int row) {
      return row >= Shape::kHalo ? -1 : halo_pixel(row) >= 0 ? 1 : 0;
    });
  }

  // conv2 from shared memory, tap by tap; only weights stream.
  {
    const int steps_a_tap = device::ceil_div(F, kDepth);
    int rows[OutGrid::kM16];
    plain_rows<kOut>(rows);
    FUSEDRES_UNROLL
    for (int m = 0; m < OutGrid::kM16; ++m) rows[m] = rows[m] / kTileQ * kStride * kHaloQ + rows[m] % kTileQ * kStride;
    for (int n0 = 0; n0 < F; n0 += kColumns) {
      typename OutGrid::Acc acc;
      acc.clear();
      device::pipeline<Ring<T, kHaloM>::kWeightSlots>(
          9 * steps_a_tap,
          [&](int step, int slot) {
            const int c0 = step % steps_a_tap * kDepth;
            load_weights(ring.weights_only(slot), problem.w2, F, 9 * F, n0, step / steps_a_tap * F + c0, F - c0);
          },
          [&](int step, int slot) {
            const int tap = step / steps_a_tap, chunk = step % steps_a_tap * (kDepth / device::kChunk);
            gemm_step<kOut>(acc, a1, rows, tap / 3 * kHaloQ + tap % 3, chunk, ring.weights_only(slot));
          });
      __syncthreads();  // the ring is free
      store_activations<OutGrid, T>(acc, a2, n0, n0, {problem.bias2, F, true}, [](int) { return 1; });
    }
  }

  // conv3 and the shortcut, 64 channels of y after another in one stream of steps: first the projection's gemm_k, then
  // conv3's. The last step of each 64 brings the residual along and carries the result out through the same tile.
  {
    const auto on_map = [&](int row, int stride, int map_width) {
      const int p = at.p0 + row / kTileQ, q = at.q0 + row % kTileQ;
      return p < P && q < Q ? p * stride * map_width + q * stride : -1;
    };
    const PixelRows<kOut> input([&](int row) { return on_map(row, kStride, W); });
    const PixelRows<kOut> output([&](int row) { return on_map(row, 1, Q); });
    const bool identity = problem.w_shortcut == nullptr;
    const int projection_steps = identity ? 0 : device::ceil_div(C, kDepth);
    const int steps = projection_steps + device::ceil_div(F, kDepth);
    int rows[OutGrid::kM16];
    plain_rows<kOut>(rows);
    typename OutGrid::Acc acc;
    acc.clear();
    device::pipeline<2>(
        device::ceil_div(K, kColumns) * steps,
        [&](int step, int slot) {
          const int n0 = step / steps * kColumns, part = step % steps, depth = part - projection_steps;
          if (depth < 0) {
            input.load(ring.activations(slot, kOut), image, C, part * kDepth);
            load_weights(ring.weights(slot), problem.w_shortcut, K, C, n0, part * kDepth, C - part * kDepth);
          } else {
            load_weights(ring.weights(slot), problem.w3, K, F, n0, depth * kDepth, F - depth * kDepth);
            if (identity && part == steps - 1) input.load(ring.activations(slot, kOut), image, C, n0);
          }
        },
        [&](int step, int slot) {
          const int part = step % steps, depth = part - projection_steps;
          if (depth < 0) {
            gemm_step<kOut>(acc, ring.activations(slot, kOut), rows, 0, 0, ring.weights(slot));
          } else {
            gemm_step<kOut>(acc, a2, rows, 0, depth * (kDepth / device::kChunk), ring.weights(slot));
          }
          if (part < steps - 1) return;
          store_output<kOut>(acc, ring.activations(slot, kOut), identity, {problem.bias3, K, true}, output, y_image, K,
                             step / steps * kColumns);
          acc.clear();
        });
  }
}

// The tiles that are compiled, by stride: a larger one repeats less of the halo and reads the weights less often, a
// smaller one needs less shared memory. `choice` 0 is the larger.
constexpr int kBottleneckTiles = 2;

template <typename T, typename Use>
bool with_bottleneck_tile(int stride, int choice, const Use& use) {
  if (stride == 1 && choice == 0) return use(BottleneckTile<1, 8, 16>{}, bottleneck_fprop_kernel<T, 1, 8, 16>, 8, 16);
  if (stride == 1 && choice == 1) return use(BottleneckTile<1, 8, 8>{}, bottleneck_fprop_kernel<T, 1, 8, 8>, 8, 8);
  if (stride == 2 && choice == 0) return use(BottleneckTile<2, 8, 8>{}, bottleneck_fprop_kernel<T, 2, 8, 8>, 8, 8);
  if (stride == 2 && choice == 1) return use(BottleneckTile<2, 4, 8>{}, bottleneck_fprop_kernel<T, 2, 4, 8>, 4, 8);
  return false;
}

// Dynamic shared memory of the smallest tile, in bytes.
inline size_t bottleneck_shared_bytes(int F, int stride) {
  size_t least = SIZE_MAX;
  for (int choice = 0; choice < kBottleneckTiles; ++choice) {
    with_bottleneck_tile<device::half>(stride, choice, [&](auto tile, auto, int, int) {
      const size_t bytes = decltype(tile)::template shared_bytes<device::half>(F);
      least = bytes < least ? bytes : least;
      return true;
    });
  }
  return least;
}

// Launches the kernel with the largest tile that fits `shared_limit` bytes, or with `choice` where it is not negative;
// false, and no launch, where none fits.
template <typename T, typename Launch>
bool bottleneck_fprop(const BottleneckProblem<T>& problem, int stride, size_t shared_limit, int choice,
                      Launch&& launch) {
  for (int i = choice < 0 ? 0 : choice; i < (choice < 0 ? kBottleneckTiles : choice + 1); ++i) {
    const bool done = with_bottleneck_tile<T>(stride, i, [&](auto tile, auto kernel, int tile_p, int tile_q) {
      const size_t shared_bytes = decltype(tile)::template shared_bytes<T>(problem.F);
      if (shared_bytes > shared_limit) return false;
      const int64_t blocks = tile_count(problem.N, problem.P, problem.Q, tile_p, tile_q);
      if (blocks > INT32_MAX) return false;
      if (blocks > 0) launch(LaunchShape{static_cast<unsigned>(blocks), kThreads, shared_bytes}, kernel, problem);
      return true;
    });
    if (done) return true;
  }
  return false;
}

}  // namespace fusedres::cuda
