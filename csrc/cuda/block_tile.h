// The parts that kernels of a whole block are built from: a thread block's GEMM step, its loads, its stores.
//
// A thread block owns a tile of output pixels of one image. Each conv in it is an implicit GEMM whose gemm_m are
// pixels; it is done 64 output channels (kColumns) and 64 of gemm_k (kDepth) at a time.
#pragma once

#include "device/async_copy.h"
#include "device/epilogue.h"
#include "device/matrix.h"
#include "device/vector.h"

namespace fusedres::cuda {

using device::Accumulators;
using device::Tile;

constexpr int kThreads = 256, kWarps = kThreads / device::kWarp;
constexpr int kColumns = 64, kDepth = 64;
constexpr int kRowsAtOnce =
    kThreads / (kDepth / device::kChunk);  // rows of a 64-wide tile that the block moves at once

// Eight warps share kM rows by kN columns of accumulators.
template <int kM, int kN = kColumns>
struct WarpGrid {
  static constexpr int kDown = kN < 64 ? 8 : kM >= 64 ? 4 : 2, kAcross = kWarps / kDown;
  static constexpr int kM16 = kM / 16 / kDown, kN8 = kN / 8 / kAcross;
  static_assert(kM16 * 16 * kDown == kM && kN8 * 8 * kAcross == kN);
  using Acc = Accumulators<kM16, kN8>;

  FUSEDRES_DEVICE static int row() { return device::warp_index() / kAcross * (kM16 * 16); }
  FUSEDRES_DEVICE static int column() { return device::warp_index() % kAcross * (kN8 * 8); }
};

// Two of these form the ring that operands stream through: kM rows of activations and 64 rows of weights.
template <typename T, int kM>
struct Ring {
  static constexpr int kSlot = (kM + kColumns) * kDepth;  // elements
  static constexpr int kSlots = 2, kWeightSlots = 4;
  static_assert(kWeightSlots * kColumns * kDepth <= kSlots * kSlot);
  T* data;

  FUSEDRES_DEVICE Tile<T> activations(int slot, int rows = kM) const { return {data + slot * kSlot, kDepth, rows}; }
  FUSEDRES_DEVICE Tile<T> weights(int slot) const { return {data + slot * kSlot + kM * kDepth, kDepth, kColumns}; }
  // Where only weights stream, the ring holds more of them.
  FUSEDRES_DEVICE Tile<T> weights_only(int slot) const { return {data + slot * kColumns * kDepth, kDepth, kColumns}; }
};

// Rows [0, kRows) of a 64-wide tile, 16 bytes a copy. `source(i, chunk)` is where row thread / 8 + i * kRowsAtOnce has
// its chunk, null for zeros; `any` is an address that may be read.
template <int kRows, typename T, typename Source>
FUSEDRES_DEVICE void load_rows(const Tile<T>& tile, const T* any, const Source& source) {
  static_assert(kRows % kRowsAtOnce == 0);
  const int chunk = static_cast<int>(threadIdx.x) % device::kChunk,
            row = static_cast<int>(threadIdx.x) / device::kChunk;
  FUSEDRES_UNROLL
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const T* from = source(i, chunk);
    device::copy_async(tile.chunk(row + i * kRowsAtOnce, chunk), from ? from : any, from != nullptr);
  }
}

// Rows n0 and following of w (rows, row_stride), 64 columns from `offset`; zeros beyond `rows` and beyond `depth`
// columns.
template <typename T>
FUSEDRES_DEVICE void load_weights(const Tile<T>& tile, const T* w, int rows, int row_stride, int n0, int offset,
                                  int depth) {
  const int first = n0 + static_cast<int>(threadIdx.x) / device::kChunk;
  load_rows<kColumns>(tile, w, [&](int i, int chunk) -> const T* {
    const int row = first + i * kRowsAtOnce;
    const bool inside = row < rows && chunk * device::kChunk < depth;
    return inside ? w + static_cast<int64_t>(row) * row_stride + offset + chunk * device::kChunk : nullptr;
  });
}

// The pixels that a thread loads: number in the image of row thread / 8 + i * kRowsAtOnce, -1 where there is none.
template <int kRows>
struct PixelRows {
  static constexpr int kCount = kRows / kRowsAtOnce;
  int pixel[kCount];

  // `number(row)`: the pixel of a row of the tile, or -1.
  template <typename Number>
  FUSEDRES_DEVICE explicit PixelRows(const Number& number) {
    FUSEDRES_UNROLL
    for (int i = 0; i < kCount; ++i) {
      pixel[i] = number(static_cast<int>(threadIdx.x) / device::kChunk + i * kRowsAtOnce);
    }
  }

  // 64 channels from c0 of each pixel of `image` (pixels, channels).
  template <typename T>
  FUSEDRES_DEVICE void load(const Tile<T>& tile, const T* image, int channels, int c0) const {
    load_rows<kRows>(tile, image, [&](int i, int chunk) -> const T* {
      const int c = c0 + chunk * device::kChunk;
      return pixel[i] >= 0 && c < channels ? image + static_cast<int64_t>(pixel[i]) * channels + c : nullptr;
    });
  }

  // The way back: 64 columns of `tile` to channels from c0, 16 bytes a store.
  template <typename T>
  FUSEDRES_DEVICE void store(const Tile<T>& tile, T* image, int channels, int c0) const {
    const int chunk = static_cast<int>(threadIdx.x) % device::kChunk,
              row = static_cast<int>(threadIdx.x) / device::kChunk;
    const int c = c0 + chunk * device::kChunk;
    FUSEDRES_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (pixel[i] < 0 || c >= channels) continue;
      T* to = image + static_cast<int64_t>(pixel[i]) * channels + c;
      device::store_vector(to, device::load_vector(tile.chunk(row + i * kRowsAtOnce, chunk)));
    }
  }
};

// One step of a GEMM: acc += A * B^T over 64 of gemm_k. `rows[m]` is the row of `a` that lane & 15 takes in piece m.
template <int kM, typename T, int kShift>
FUSEDRES_DEVICE void gemm_step(typename WarpGrid<kM>::Acc& acc, const Tile<T, kShift>& a,
                               const int (&rows)[WarpGrid<kM>::kM16], int row_offset, int first_chunk,
                               const Tile<T>& weights) {
  using Grid = WarpGrid<kM>;
  const int column = Grid::column();
  device::multiply_tiles<T, kDepth / 16>(
      acc, [&](int m, int chunk) { return a.chunk(rows[m] + row_offset, first_chunk + chunk); },
      [&](int row, int chunk) { return weights.chunk(column + row, chunk); });
}

// The rows of a plain GEMM: row m of the tile is row m of A.
template <int kM>
FUSEDRES_DEVICE void plain_rows(int (&rows)[WarpGrid<kM>::kM16]) {
  FUSEDRES_UNROLL
  for (int m = 0; m < WarpGrid<kM>::kM16; ++m) rows[m] = WarpGrid<kM>::row() + m * 16 + device::lane_index() % 16;
}

// The accumulators of channels c0.. through `epilogue` into columns `to`.. of `tile`, where `keep(row)`: 1 writes, 0
// writes zeros, -1 does not write.
template <typename Grid, typename T, typename Tile, typename Keep>
FUSEDRES_DEVICE void store_activations(const typename Grid::Acc& acc, const Tile& tile, int to, int c0,
                                       const device::BiasResidualRelu& epilogue, const Keep& keep) {
  acc.for_each_pair([&](int row, int col, float first, float second) {
    col += Grid::column();
    row += Grid::row();
    const int kept = keep(row);
    if (kept < 0) return;
    const uint32_t bits = device::pack<T>(epilogue(first, c0 + col, 0.0f), epilogue(second, c0 + col + 1, 0.0f));
    tile.set_pair(row, to + col, kept ? bits : 0u);
  });
}

// The accumulators plus what `tile` holds (where `add`) through `epilogue`, into the same places of `tile`, from where
// `pixels` takes them to channels c0.. of `image`. Nobody else may read `tile` meanwhile.
template <int kM, typename T, int kRows>
FUSEDRES_DEVICE void store_output(const typename WarpGrid<kM>::Acc& acc, const Tile<T>& tile, bool add,
                                  const device::BiasResidualRelu& epilogue, const PixelRows<kRows>& pixels, T* image,
                                  int channels, int c0) {
  acc.for_each_pair([&](int row, int col, float first, float second) {
    row += WarpGrid<kM>::row();
    col += WarpGrid<kM>::column();
    float residual[2] = {0.0f, 0.0f};
    if (add) device::unpack<T>(tile.pair(row, col), residual);
    tile.set_pair(row, col,
                  device::pack<T>(epilogue(first, c0 + col, residual[0]), epilogue(second, c0 + col + 1, residual[1])));
  });
  __syncthreads();
  pixels.store(tile, image, channels, c0);
}

// A thread block's tile of a map: image n, first row p0 and column q0.
struct TilePosition {
  int64_t n;
  int p0, q0;
};

template <int kTileP, int kTileQ>
FUSEDRES_DEVICE TilePosition tile_position(int P, int Q) {
  const unsigned across = device::ceil_div(Q, kTileQ), down = device::ceil_div(P, kTileP), block = blockIdx.x;
  return {block / across / down, static_cast<int>(block / across % down) * kTileP,
          static_cast<int>(block % across) * kTileQ};
}

inline int64_t tile_count(int64_t N, int P, int Q, int tile_p, int tile_q) {
  return N * device::ceil_div(P, tile_p) * device::ceil_div(Q, tile_q);
}

}  // namespace fusedres::cuda
