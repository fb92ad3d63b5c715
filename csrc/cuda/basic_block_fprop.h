// `basic_block_fprop_kernel`: an eval basic block in one launch, the activation between its two 3x3 convs never leaves
// the chip.
//
// A thread block computes a kTileP x kTileQ tile of the output. conv1 (3x3, stride 1 or 2) runs on the tile and a halo
// of one pixel, conv2 (3x3) on its output in shared memory; the residual is x itself, or the projection of x,
// accumulated into conv2's accumulators. BN is folded: weights in T, biases in float32.
//
// The halo is computed again by the neighbour: conv1's arithmetic grows by 180/128 for a tile of 8x16.
#pragma once

#include "cuda/block_tile.h"
#include "cuda/launch.h"

namespace fusedres::cuda {

// C and F are multiples of 8, every pointer is aligned to 16 bytes, P = (H - 1) / stride + 1.
template <typename T>
struct BasicBlockProblem {
  const T* x;                  // (N, H, W, C)
  const T *w1, *w2;            // (F, 3, 3, C), (F, 3, 3, F)
  const T* w_shortcut;         // (F, C), or null: the residual is x
  const float *bias1, *bias2;  // (F,); bias2 includes the projection's
  T* y;                        // (N, P, Q, F)
  int N, H, W, C, F, P, Q, stride;
};

template <int kTileP, int kTileQ>
struct BasicBlockTile {
  static constexpr int kHaloQ = kTileQ + 2, kHalo = (kTileP + 2) * kHaloQ;
  static constexpr int kHaloM = device::round_up(kHalo, 64), kOut = kTileP * kTileQ;

  template <typename T>
  static size_t shared_bytes(int F) {
    const size_t width = device::round_up(F, kColumns);
    return sizeof(T) * (Ring<T, kHaloM>::kSlots * Ring<T, kHaloM>::kSlot + kHalo * width);
  }
};

template <typename T, int kTileP, int kTileQ>
__global__ void __launch_bounds__(kThreads, 1) basic_block_fprop_kernel(const BasicBlockProblem<T> problem) {
  using Shape = BasicBlockTile<kTileP, kTileQ>;
  constexpr int kHaloM = Shape::kHaloM, kHaloQ = Shape::kHaloQ, kOut = Shape::kOut;
  using HaloGrid = WarpGrid<kHaloM>;
  using OutGrid = WarpGrid<kOut>;
  const int H = problem.H, W = problem.W, C = problem.C, F = problem.F, P = problem.P, Q = problem.Q;
  const int stride = problem.stride;

  device::SharedArena arena;
  const int width = device::round_up(F, kColumns);
  const Ring<T, kHaloM> ring{arena.take<T>(Ring<T, kHaloM>::kSlots * Ring<T, kHaloM>::kSlot)};
  const Tile<T> a1{arena.take<T>(Shape::kHalo * width), width, Shape::kHalo};

  const TilePosition at = tile_position<kTileP, kTileQ>(P, Q);
  const T* image = problem.x + at.n * H * W * C;
  T* y_image = problem.y + at.n * P * Q * F;

  // conv1 on the tile and its halo, tap by tap. Outside its map lies conv2's padding, which is zero, not relu(bias1).
  const auto on_map = [&](int row) {
    const int p = at.p0 - 1 + row / kHaloQ, q = at.q0 - 1 + row % kHaloQ;
    return row < Shape::kHalo && p >= 0 && p < P && q >= 0 && q < Q;
  };
  {
    const int steps_a_tap = device::ceil_div(C, kDepth);
    int rows[HaloGrid::kM16];
    plain_rows<kHaloM>(rows);
    for (int n0 = 0; n0 < F; n0 += kColumns) {
      typename HaloGrid::Acc acc;
      acc.clear();
      device::pipeline<2>(
          9 * steps_a_tap,
          [&](int step, int slot) {
            const int tap = step / steps_a_tap, c0 = step % steps_a_tap * kDepth;
            const PixelRows<kHaloM> taps([&](int row) {
              const int h = (at.p0 - 1 + row / kHaloQ) * stride - 1 + tap / 3;
              const int w = (at.q0 - 1 + row % kHaloQ) * stride - 1 + tap % 3;
              return on_map(row) && h >= 0 && h < H && w >= 0 && w < W ? h * W + w : -1;
            });
            taps.load(ring.activations(slot), image, C, c0);
            load_weights(ring.weights(slot), problem.w1, F, 9 * C, n0, tap * C + c0, C - c0);
          },
          [&](int, int slot) { gemm_step<kHaloM>(acc, ring.activations(slot), rows, 0, 0, ring.weights(slot)); });
      __syncthreads();  // the ring is free
      store_activations<HaloGrid, T>(acc, a1, n0, n0, {problem.bias1, F, true}, [&](int row) {
        return row >= Shape::kHalo ? -1 : on_map(row) ? 1 : 0;
      });
    }
  }

  // conv2 and the shortcut, 64 channels of y after another in one stream of steps: first the projection's gemm_k, then
  // conv2's taps. The last step of each 64 brings the residual along and carries the result out.
  const auto output_pixel = [&](int row, int step, int map_width) {
    const int p = at.p0 + row / kTileQ, q = at.q0 + row % kTileQ;
    return p < P && q < Q ? p * step * map_width + q * step : -1;
  };
  const PixelRows<kOut> input([&](int row) { return output_pixel(row, stride, W); });
  const PixelRows<kOut> output([&](int row) { return output_pixel(row, 1, Q); });
  const bool identity = problem.w_shortcut == nullptr;
  const int steps_a_tap = device::ceil_div(F, kDepth), projection_steps = identity ? 0 : device::ceil_div(C, kDepth);
  const int steps = projection_steps + 9 * steps_a_tap;
  int rows[OutGrid::kM16], halo_rows[OutGrid::kM16];
  plain_rows<kOut>(rows);
  FUSEDRES_UNROLL
  for (int m = 0; m < OutGrid::kM16; ++m) halo_rows[m] = rows[m] / kTileQ * kHaloQ + rows[m] % kTileQ;
  typename OutGrid::Acc acc;
  acc.clear();
  device::pipeline<2>(
      device::ceil_div(F, kColumns) * steps,
      [&](int step, int slot) {
        const int n0 = step / steps * kColumns, part = step % steps, depth = part - projection_steps;
        if (depth < 0) {
          input.load(ring.activations(slot, kOut), image, C, part * kDepth);
          load_weights(ring.weights(slot), problem.w_shortcut, F, C, n0, part * kDepth, C - part * kDepth);
        } else {
          const int c0 = depth % steps_a_tap * kDepth;
          load_weights(ring.weights(slot), problem.w2, F, 9 * F, n0, depth / steps_a_tap * F + c0, F - c0);
          if (identity && part == steps - 1) input.load(ring.activations(slot, kOut), image, C, n0);
        }
      },
      [&](int step, int slot) {
        const int part = step % steps, depth = part - projection_steps;
        if (depth < 0) {
          gemm_step<kOut>(acc, ring.activations(slot, kOut), rows, 0, 0, ring.weights(slot));
        } else {
          const int tap = depth / steps_a_tap, chunk = depth % steps_a_tap * (kDepth / device::kChunk);
          gemm_step<kOut>(acc, a1, halo_rows, tap / 3 * kHaloQ + tap % 3, chunk, ring.weights(slot));
        }
        if (part < steps - 1) return;
        store_output<kOut>(acc, ring.activations(slot, kOut), identity, {problem.bias2, F, true}, output, y_image, F,
                           step / steps * kColumns);
        acc.clear();
      });
}

// Dynamic shared memory of the smallest tile, in bytes.
inline size_t basic_block_shared_bytes(int F) { return BasicBlockTile<8, 8>::shared_bytes<device::half>(F); }

// Launches the kernel with the largest tile that fits `shared_limit` bytes, or with `choice` (0: 8x16, 1: 8x8) where it
// is not negative; false, and no launch, where none fits.
template <typename T, typename Launch>
bool basic_block_fprop(const BasicBlockProblem<T>& problem, size_t shared_limit, int choice, Launch&& launch) {
  const auto use = [&](auto tile, auto kernel, int tile_p, int tile_q) {
    const size_t shared_bytes = decltype(tile)::template shared_bytes<T>(problem.F);
    const int64_t blocks = tile_count(problem.N, problem.P, problem.Q, tile_p, tile_q);
    if (shared_bytes > shared_limit || blocks > INT32_MAX) return false;
    if (blocks > 0) launch(LaunchShape{static_cast<unsigned>(blocks), kThreads, shared_bytes}, kernel, problem);
    return true;
  };
  return (choice != 1 && use(BasicBlockTile<8, 16>{}, basic_block_fprop_kernel<T, 8, 16>, 8, 16)) ||
         (choice != 0 && use(BasicBlockTile<8, 8>{}, basic_block_fprop_kernel<T, 8, 8>, 8, 8));
}

}  // namespace fusedres::cuda
