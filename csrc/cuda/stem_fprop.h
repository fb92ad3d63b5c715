// `stem_fprop_kernel`: a network's first conv, BN and ReLU in one launch, for ImageNet with the max pool behind them.
//
// For ImageNet (conv 7x7 stride 2, max pool 3x3 stride 2) the conv's map, the largest of a ResNet, is never written: a
// thread block computes kTileP x kTileQ pooled pixels of one image from the kConvP x kConvQ conv pixels under them. For
// CIFAR (conv 3x3 stride 1) it writes the conv pixels themselves.
//
// With channels padded to 4, the taps of a filter row and one of zero weight are neighbours in memory: ldmatrix reads
// the conv's operand in place, without im2col, where it begins at a multiple of 16 bytes, two pixels. At stride 2 it
// always does; at stride 1 odd pixels read a second copy of the patch that lies one pixel further left. gemm_k of a
// 3-channel image is so 7 * 32 = 224 for 147, and 3 * 16 = 48 for 27.
#pragma once

#include "cuda/block_tile.h"
#include "cuda/launch.h"

namespace fusedres::cuda {

// P, Q: the conv's map, P = (H - 1) / stride + 1; U, V: the output, pooled U = (P - 1) / 2 + 1, else the conv's map.
// K is a multiple of 8.
template <typename T>
struct StemProblem {
  const T* x;         // (N, H, W, C), C <= 4, of any alignment
  const T* w;         // (K, 7, 8, 4) or (K, 3, 4, 4): taps and channels beyond the conv's are zero
  const float* bias;  // (K,)
  T* y;               // (N, U, V, K)
  int N, H, W, C, K, P, Q, U, V;
};

template <int kFilter_, int kStride_, bool kPooled_, int kTileP_, int kTileQ_, int kWide_>
struct StemTile {
  static constexpr int kFilter = kFilter_, kStride = kStride_, kTileP = kTileP_, kTileQ = kTileQ_;
  static constexpr int kWide = kWide_;  // output channels at a time
  static constexpr bool kPooled = kPooled_;
  static constexpr int kConvP = kPooled ? 2 * kTileP + 1 : kTileP, kConvQ = kPooled ? 2 * kTileQ + 1 : kTileQ;
  static constexpr int kConv = kConvP * kConvQ;
  static constexpr int kRow = (kFilter + 1) * 4, kTaps = kFilter * kRow;  // gemm_k of a filter row, and in all
  static constexpr int kWeightStride = device::round_up(kTaps, 64);
  static constexpr int kPatchH = kStride * (kConvP - 1) + kFilter;
  static constexpr int kPatchW = device::round_up(kStride * (kConvQ - 1) + kFilter + 1, 2), kPatch = kPatchH * kPatchW;
  // Two copies begin half of all banks apart: eight neighbouring pixels, read from both, lie in different ones.
  static constexpr int kCopies = kStride % 2 + 1;
  static constexpr int kCopyStride = device::round_up(kPatch * 4, 64) + (kCopies == 2 ? 32 : 0);
  using Grid = WarpGrid<device::round_up(kConv, kWide < 64 ? 128 : 64), kWide>;

  template <typename T>
  static constexpr size_t shared_bytes() {
    return sizeof(T) * (kCopies * kCopyStride + kWide * kWeightStride + device::round_up(kConv * kWide, 64));
  }
};

// Conv pixels in shared memory, kWide channels of each; narrow pixels share a row of the tile.
template <typename T, int kWide>
struct StemPixels {
  static constexpr int kInRow = kColumns / kWide, kChunks = kWide / device::kChunk;
  Tile<T> tile;

  FUSEDRES_DEVICE T* chunk(int pixel, int index) const {
    return tile.chunk(pixel / kInRow, pixel % kInRow * kChunks + index);
  }
  FUSEDRES_DEVICE void set_pair(int pixel, int col, uint32_t bits) const {
    tile.set_pair(pixel / kInRow, pixel % kInRow * kWide + col, bits);
  }
};

// Pixels [h0, h0 + kPatchH) x [w0, w0 + kPatchW) of an image, channels padded to 4; zeros outside.
template <typename Shape, typename T>
FUSEDRES_DEVICE void load_patch(const device::SharedArray<T>& patch, const T* image, int H, int W, int C, int h0,
                                int w0) {
  for (int i = threadIdx.x; i < Shape::kPatch; i += kThreads) {
    const int h = h0 + i / Shape::kPatchW, w = w0 + i % Shape::kPatchW;
    const bool inside = h >= 0 && h < H && w >= 0 && w < W;
    const T* pixel = image + (static_cast<int64_t>(h) * W + w) * C;
    FUSEDRES_UNROLL
    for (int c = 0; c < 4; ++c) {
      const T value = inside && c < C ? pixel[c] : device::from_float<T>(0.0f);
      patch.store(i * 4 + c, value);
      if (Shape::kCopies == 2 && i > 0) patch.store(Shape::kCopyStride + (i - 1) * 4 + c, value);
    }
  }
}

// 8 channels of an output pixel a thread, from `channel` on: the pixel itself, or the largest of the nine under it.
template <typename Shape, typename T>
FUSEDRES_DEVICE void output_chunk(const StemPixels<T, Shape::kWide>& conv, int du, int dv, int chunk, T* to) {
  if constexpr (Shape::kPooled) {
    float best[device::kChunk] = {};
    FUSEDRES_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      const int pixel = (2 * du + tap / 3) * Shape::kConvQ + 2 * dv + tap % 3;
      const device::Vector<T> values = device::load_vector(conv.chunk(pixel, chunk));
      FUSEDRES_UNROLL
      for (int j = 0; j < device::kChunk; ++j) {
        best[j] = device::max_keeping_nan(best[j], device::to_float(values.value[j]));
      }
    }
    device::store_floats(to, device::kChunk, best);
  } else {
    device::store_vector(to, device::load_vector(conv.chunk(du * Shape::kConvQ + dv, chunk)));
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, 1) stem_fprop_kernel(const StemProblem<T> problem) {
  using Grid = typename Shape::Grid;
  constexpr int kWide = Shape::kWide, kTileP = Shape::kTileP, kTileQ = Shape::kTileQ, kRow = Shape::kRow;
  const int P = problem.P, Q = problem.Q, K = problem.K, U = problem.U, V = problem.V;
  device::SharedArena arena;
  constexpr int kPatch = Shape::kCopies * Shape::kCopyStride, kConvRows = device::ceil_div(Shape::kConv * kWide, 64);
  const device::SharedArray<T> patch{arena.take<T>(kPatch), kPatch};
  const Tile<T> weights{arena.take<T>(kWide * Shape::kWeightStride), Shape::kWeightStride, kWide};
  const StemPixels<T, kWide> conv{{arena.take<T>(kConvRows * kColumns), kColumns, kConvRows}};

  const TilePosition at = tile_position<kTileP, kTileQ>(U, V);
  const T* image = problem.x + at.n * problem.H * problem.W * problem.C;
  // The pool's padding is 1, the conv's half of its filter.
  const int conv_p0 = Shape::kPooled ? 2 * at.p0 - 1 : at.p0, conv_q0 = Shape::kPooled ? 2 * at.q0 - 1 : at.q0;
  load_patch<Shape>(patch, image, problem.H, problem.W, problem.C, Shape::kStride * conv_p0 - Shape::kFilter / 2,
                    Shape::kStride * conv_q0 - Shape::kFilter / 2);

  // The conv pixel of each of this lane's rows; rows beyond the tile repeat its last.
  int first[Grid::kM16];
  FUSEDRES_UNROLL
  for (int m = 0; m < Grid::kM16; ++m) {
    int row = Grid::row() + m * 16 + device::lane_index() % 16;
    row = row < Shape::kConv ? row : Shape::kConv - 1;
    const int column = row % Shape::kConvQ * Shape::kStride, odd = column % 2;
    first[m] = odd * Shape::kCopyStride + (row / Shape::kConvQ * Shape::kStride * Shape::kPatchW + column - odd) * 4;
  }

  for (int n0 = 0; n0 < K; n0 += kWide) {
    for (int i = threadIdx.x; i < kWide * (Shape::kTaps / device::kChunk); i += kThreads) {
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
    for (int r = 0; r < Shape::kFilter; ++r) {
      device::multiply_tiles<T, kRow / 16>(
          acc, [&](int m, int chunk) { return patch.at(first[m] + r * Shape::kPatchW * 4 + chunk * device::kChunk); },
          [&](int row, int chunk) { return weights.chunk(Grid::column() + row, r * (kRow / device::kChunk) + chunk); },
          // The last tap, gemm_k 12 to 15 of 16, reads a pixel that is not the filter's: NaN there times 0 would be
          // NaN.
          [](int k16, uint32_t (&a)[4]) {
            if (k16 == kRow / 16 - 1 && device::lane_index() % 4 >= 2) a[2] = a[3] = 0u;
          });
    }
    // Outside the conv's map lies the pool's padding: 0 never beats a ReLU's output.
    store_activations<Grid, T>(acc, conv, 0, n0, {problem.bias, K, true}, [&](int row) {
      if (row >= Shape::kConv) return -1;
      const int p = conv_p0 + row / Shape::kConvQ, q = conv_q0 + row % Shape::kConvQ;
      return p >= 0 && p < P && q >= 0 && q < Q ? 1 : 0;
    });
    __syncthreads();

    for (int i = threadIdx.x; i < kTileP * kTileQ * (kWide / device::kChunk); i += kThreads) {
      const int chunk = i % (kWide / device::kChunk), pixel = i / (kWide / device::kChunk);
      const int du = pixel / kTileQ, dv = pixel % kTileQ, u = at.p0 + du, v = at.q0 + dv;
      const int channel = n0 + chunk * device::kChunk;
      if (u >= U || v >= V || channel >= K) continue;
      output_chunk<Shape>(conv, du, dv, chunk, problem.y + ((at.n * U + u) * V + v) * K + channel);
    }
  }
}

// What is compiled: the stem for ImageNet, and that for CIFAR by how many channels it computes at a time.
using PooledStemTile = StemTile<7, 2, true, 4, 8, 64>;
using NarrowStemTile = StemTile<3, 1, false, 8, 32, 16>;
using WideStemTile = StemTile<3, 1, false, 8, 16, 64>;
constexpr int kNarrowStem = 32;  // most output channels that the narrow tile takes

template <typename Shape, typename T, typename Launch>
bool stem_fprop_tile(const StemProblem<T>& problem, size_t shared_limit, Launch&& launch) {
  const int64_t blocks = tile_count(problem.N, problem.U, problem.V, Shape::kTileP, Shape::kTileQ);
  if (Shape::template shared_bytes<T>() > shared_limit || blocks > INT32_MAX || problem.C > 4) return false;
  const LaunchShape shape{static_cast<unsigned>(blocks), kThreads, Shape::template shared_bytes<T>()};
  if (blocks > 0) launch(shape, stem_fprop_kernel<T, Shape>, problem);
  return true;
}

// `filter`: 7, pooled, or 3. False, and no launch, where `shared_limit` is too small or a size is not served.
template <typename T, typename Launch>
bool stem_fprop(const StemProblem<T>& problem, int filter, size_t shared_limit, Launch&& launch) {
  if (filter == 7) return stem_fprop_tile<PooledStemTile>(problem, shared_limit, launch);
  if (filter != 3) return false;
  return problem.K <= kNarrowStem ? stem_fprop_tile<NarrowStemTile>(problem, shared_limit, launch)
                                  : stem_fprop_tile<WideStemTile>(problem, shared_limit, launch);
}

}  // namespace fusedres::cuda
