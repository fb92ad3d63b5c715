// One task of a weight gradient (wgrad_plan.h): pack a block of both operands, multiply it into a tile, while fetching
// the next. Included by foreach_isa.h, per instruction set.

#include "cpu/prologue.h"
#include "cpu/wgrad_micro_tile.h"
#include "cpu/wgrad_pack.h"
#include "cpu/wgrad_prefetch.h"
#include "cpu/wgrad_tile.h"
#include "cpu/wgrad_write.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// Elements of the buffers that suffice for every task.
template <typename T>
WgradBuffers wgrad_buffers(const WgradPlan& plan) {
  const WgradTile tile = WgradTile::of(plan, 0, kLanes<T>);  // the first tile is the largest
  const int64_t g = plan.largest_g_pixels(), x = plan.largest_x_pixels();
  const auto whole_lines = [](int64_t elements) { return ceil_div(elements, 16) * 16; };
  return {whole_lines(tile.rows.elements(plan.vectors_along_k ? x : g)),
          whole_lines(tile.vectors.elements(plan.vectors_along_k ? g : x)), tile.elements(), tile.rows.count()};
}

// The pixels of a block that tap (r, s) meets inside the input; those in the padding contribute nothing, not even
// 0*NaN.
inline WgradWalk wgrad_walk(const WgradPlan& plan, const WgradBlock& block, int64_t r, int64_t s) {
  const Range p = plan.h.valid_outputs(r, block.g_rows), q = plan.w.valid_outputs(s, block.g_cols);
  const ConvAxis &h = plan.h.axis, &w = plan.w.axis;
  const int64_t g_cols = block.g_cols.size(), x_cols = block.x_cols.size();
  const int64_t x_row = p.begin * h.stride + r * h.dilation - h.padding - block.x_rows.begin;
  const int64_t x_col = q.begin * w.stride + s * w.dilation - w.padding - block.x_cols.begin;
  const int64_t x_begin = x_row * x_cols + Cut(x_cols, w.stride).begin(x_col % w.stride) + x_col / w.stride;
  const WgradWalk::Side g{(p.begin - block.g_rows.begin) * g_cols + q.begin - block.g_cols.begin,
                          block.g_rows.size() * g_cols, g_cols};
  const WgradWalk::Side x{x_begin, block.x_rows.size() * x_cols, h.stride * x_cols};
  WgradWalk walk{block.images.size(), p.size(), q.size(), g, x};
  if (plan.vectors_along_k) std::swap(walk.row_side, walk.vector_side);
  walk.collapse();
  return walk;
}

// Multiplies one packed block into the tile. `between()` is called between micro-tiles.
template <typename Lane, typename Tile, typename Between>
void wgrad_multiply(const WgradPlan& plan, const WgradBlock& block, const WgradTile& layout, const Lane* row_side,
                    const Lane* vector_side, Tile* tile, Between&& between) {
  const int64_t row_pixels = plan.vectors_along_k ? block.x_pixels() : block.g_pixels();
  const int64_t vector_pixels = plan.vectors_along_k ? block.g_pixels() : block.x_pixels();
  for (int64_t j = 0; j < layout.vectors.count(); ++j) {
    for (int64_t tap = 0; tap < layout.taps; ++tap) {
      const WgradWalk walk = wgrad_walk(plan, block, tap / plan.w.axis.kernel, tap % plan.w.axis.kernel);
      if (walk.rows * walk.cols == 0) continue;
      for (int64_t i = 0; i < layout.rows.count(); ++i) {
        if (layout.skips(j, i)) continue;
        between();
        wgrad_micro_tile_of<Lane, Tile>(layout.rows.units(i), layout.vectors.units(j))(
            walk, row_side + layout.rows.offset(i, row_pixels), vector_side + layout.vectors.offset(j, vector_pixels),
            tile + layout.offset(j, tap, i));
      }
    }
  }
}

inline WgradPixels wgrad_x_pixels(const WgradPlan& plan, const WgradBlock& block) {
  return {block.images, block.x_rows, block.x_cols, plan.h.start,
          plan.h.step,  plan.w.start, plan.w.step,  plan.w.axis.stride};
}

inline WgradPixels wgrad_g_pixels(const WgradPlan& plan, const WgradBlock& block) {
  if (plan.problem.symmetric) return wgrad_x_pixels(plan, block);
  return {block.images, block.g_rows, block.g_cols};
}

// tile = the sum over one chunk of pixels. row_side and vector_side hold one packed block.
template <typename T, typename Tile>
void wgrad_accumulate(const WgradPlan& plan, const WgradOperand<T>& g, const WgradOperand<T>& x, int64_t tile_index,
                      int64_t chunk, acc_t<T>* row_side, acc_t<T>* vector_side, Tile* tile) {
  const WgradTile layout = WgradTile::of(plan, tile_index, kLanes<T>);
  const Range k = plan.k_range(tile_index), c = plan.c_range(tile_index), blocks = plan.blocks(chunk);
  const WgradPanels& g_panels = plan.vectors_along_k ? layout.vectors : layout.rows;
  const WgradPanels& x_panels = plan.vectors_along_k ? layout.rows : layout.vectors;
  acc_t<T>* g_packed = plan.vectors_along_k ? vector_side : row_side;
  acc_t<T>* x_packed = plan.vectors_along_k ? row_side : vector_side;
  std::fill_n(tile, layout.elements(), Tile{0});
  for (int64_t index = blocks.begin; index < blocks.end; ++index) {
    const WgradBlock block = plan.block(index), next = plan.block(std::min(index + 1, blocks.end - 1));
    wgrad_pack(g, wgrad_g_pixels(plan, block), k.begin, g_panels, g_packed);
    wgrad_pack(x, wgrad_x_pixels(plan, block), c.begin, x_panels, x_packed);
    WgradPrefetch<T> next_g(g, wgrad_g_pixels(plan, next), k, layout.micro_tiles());
    WgradPrefetch<T> next_x(x, wgrad_x_pixels(plan, next), c, layout.micro_tiles());
    wgrad_multiply(plan, block, layout, row_side, vector_side, tile, [&] {
      next_g.advance();
      next_x.advance();
    });
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
