// `stem_fprop_kernel`: conv 7x7 stride 2, BN, ReLU and max pool 3x3 stride 2 in one launch; the conv's map, the largest
// of a ResNet, is never written.
//
// A thread block computes kTileP x kTileQ pooled pixels of one image, 64 channels of them, from the kConvP x kConvQ
// conv pixels under them. With channels padded to 4, the seven taps of a filter row and one of zero weight are 32
// neighbours in memory, and as the stride is 2 they begin at a multiple of 16 bytes: ldmatrix reads the conv's operand
// in place, without im2col. gemm_k is so 7 * 32 = 224 for the 147 of a 3-channel image.
#pragma once

#include "cuda/block_tile.h"
#include "cuda/launch.h"

namespace fusedres::cuda {

// P, Q: the conv's map, P = (H - 1) / 2 + 1; U, V: the pooled one, U = (P - 1) / 2 + 1. K is a multiple of 8.
template <typename T>
struct StemProblem {
  const T* x;         // (N, H, W, C), C <= 4, of any alignment
  const T* w;         // (K, 7, 8, 4): taps and channels beyond the conv's are zero
  const float* bias;  // (K,)
  T* y;               // (N, U, V, K)
  int N, H, W, C, K, P, Q, U, V;
};

template <int kTileP, int kTileQ>
struct StemTile {
  static constexpr int kConvP = 2 * kTileP + 1, kConvQ = 2 * kTileQ + 1, kConv = kConvP * kConvQ;
  static constexpr int kM = device::round_up(kConv, 64);
  static constexpr int kPatchH = 2 * (kConvP - 1) + 7, kPatchW = 2 * (kConvQ - 1) + 8;
  static constexpr int kTaps = 7 * 32;  // gemm_k
  static constexpr int kWeightStride = 256;

  template <typename T>
  static constexpr size_t shared_bytes() {
    return sizeof(T) * (device::round_up(kPatchH * kPatchW * 4, 64) + kColumns * kWeightStride + kConv * kColumns);
  }
};

// Pixels [h0, h0 + kPatchH) x [w0, w0 + kPatchW) of an image, channels padded to 4; zeros outside.
template <typename Shape, typename T>
FUSEDRES_DEVICE void load_patch(T* patch, const T* image, int H, int W, int C, int h0, int w0) {
  for (int i = threadIdx.x; i < Shape::kPatchH * Shape::kPatchW; i += kThreads) {
    const int h = h0 + i / Shape::kPatchW, w = w0 + i % Shape::kPatchW;
    const bool inside = h >= 0 && h < H && w >= 0 && w < W;
    const T* pixel = image + (static_cast<int64_t>(h) * W + w) * C;
    FUSEDRES_UNROLL
    for (int c = 0; c < 4; ++c) patch[i * 4 + c] = inside && c < C ? pixel[c] : device::from_float<T>(0.0f);
  }
}

template <typename T, int kTileP, int kTileQ>
__global__ void __launch_bounds__(kThreads, 1) stem_fprop_kernel(const StemProblem<T> problem) {
  using Shape = StemTile<kTileP, kTileQ>;
  using Grid = WarpGrid<Shape::kM>;
  const int P = problem.P, Q = problem.Q, K = problem.K, U = problem.U, V = problem.V;
  device::SharedArena arena;
  T* patch = arena.take<T>(device::round_up(Shape::kPatchH * Shape::kPatchW * 4, 64));
  const Tile<T> weights{arena.take<T>(kColumns * Shape::kWeightStride), Shape::kWeightStride};
  const Tile<T> conv{arena.take<T>(Shape::kConv * kColumns), kColumns};

  const TilePosition at = tile_position<kTileP, kTileQ>(U, V);
  const T* image = problem.x + at.n * problem.H * problem.W * problem.C;
  const int conv_p0 = 2 * at.p0 - 1, conv_q0 = 2 * at.q0 - 1;  // the pool's padding is 1
  load_patch<Shape>(patch, image, problem.H, problem.W, problem.C, 2 * conv_p0 - 3, 2 * conv_q0 - 3);

  // The conv pixel of each of this lane's rows; rows beyond the tile repeat its last.
  int first[Grid::kM16];
  FUSEDRES_UNROLL
  for (int m = 0; m < Grid::kM16; ++m) {
    int row = Grid::row() + m * 16 + device::lane_index() % 16;
    row = row < Shape::kConv ? row : Shape::kConv - 1;
    first[m] = (row / Shape::kConvQ * 2 * Shape::kPatchW + row % Shape::kConvQ * 2) * 4;
  }

  for (int n0 = 0; n0 < K; n0 += kColumns) {
    __syncthreads();  // the last channels' weights and conv pixels have been read
    for (int i = threadIdx.x; i < kColumns * (Shape::kTaps / device::kChunk); i += kThreads) {
      const int row = i / (Shape::kTaps / device::kChunk), chunk = i % (Shape::kTaps / device::kChunk);
      const bool inside = n0 + row < K;
      const T* from =
          inside ? problem.w + static_cast<int64_t>(n0 + row) * Shape::kTaps + chunk * device::kChunk : problem.w;
      device::copy_async(weights.chunk(row, chunk), from, inside);
    }
    device::commit_copies();
    device::wait_copies<0>();
    __syncthreads();

    typename Grid::Acc acc;
    acc.clear();
    for (int r = 0; r < 7; ++r) {
      device::multiply_tiles<T, 2>(
          acc, [&](int m, int chunk) { return patch + first[m] + r * Shape::kPatchW * 4 + chunk * device::kChunk; },
          [&](int row, int chunk) { return weights.chunk(Grid::column() + row, r * 4 + chunk); },
          // The eighth tap, gemm_k 28 to 31, reads a pixel that is not the filter's: NaN there times 0 would be NaN.
          [](int k16, uint32_t (&a)[4]) {
            if (k16 == 1 && device::lane_index() % 4 >= 2) a[2] = a[3] = 0u;
          });
    }
    // Outside the conv's map lies the pool's padding: 0 never beats a ReLU's output.
    store_activations<Shape::kM>(acc, conv, 0, n0, {problem.bias, K, true}, [&](int row) {
      if (row >= Shape::kConv) return -1;
      const int p = conv_p0 + row / Shape::kConvQ, q = conv_q0 + row % Shape::kConvQ;
      return p >= 0 && p < P && q >= 0 && q < Q ? 1 : 0;
    });
    __syncthreads();

    // The pool, 8 channels of a pixel a thread.
    for (int i = threadIdx.x; i < kTileP * kTileQ * (kColumns / device::kChunk); i += kThreads) {
      const int chunk = i % (kColumns / device::kChunk), pixel = i / (kColumns / device::kChunk);
      const int du = pixel / kTileQ, dv = pixel % kTileQ, u = at.p0 + du, v = at.q0 + dv;
      const int channel = n0 + chunk * device::kChunk;
      if (u >= U || v >= V || channel >= K) continue;
      float best[device::kChunk] = {};
      FUSEDRES_UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        const int row = (2 * du + tap / 3) * Shape::kConvQ + 2 * dv + tap % 3;
        const device::Vector<T> values = device::load_vector(conv.chunk(row, chunk));
        FUSEDRES_UNROLL
        for (int j = 0; j < device::kChunk; ++j) {
          best[j] = device::max_keeping_nan(best[j], device::to_float(values.value[j]));
        }
      }
      device::store_floats(problem.y + ((at.n * U + u) * V + v) * K + channel, device::kChunk, best);
    }
  }
}

constexpr int kStemTileP = 4, kStemTileQ = 8;

// False, and no launch, where `shared_limit` is too small or a size is not served.
template <typename T, typename Launch>
bool stem_fprop(const StemProblem<T>& problem, size_t shared_limit, Launch&& launch) {
  using Shape = StemTile<kStemTileP, kStemTileQ>;
  const int64_t blocks = tile_count(problem.N, problem.U, problem.V, kStemTileP, kStemTileQ);
  if (Shape::template shared_bytes<T>() > shared_limit || blocks > INT32_MAX || problem.C > 4) return false;
  const LaunchShape shape{static_cast<unsigned>(blocks), kThreads, Shape::template shared_bytes<T>()};
  if (blocks > 0) launch(shape, stem_fprop_kernel<T, kStemTileP, kStemTileQ>, problem);
  return true;
}

}  // namespace fusedres::cuda
