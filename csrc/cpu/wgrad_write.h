// From tiles to dw. Included by wgrad_kernels.h, per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

// `count` elements, converted.
template <typename Out>
void wgrad_write_run(Out* to, const acc_t<Out>* from, int64_t count) {
  for (; count >= kLanes<Out>; count -= kLanes<Out>, to += kLanes<Out>, from += kLanes<Out>) store(to, load(from));
  if (count > 0) store_partial(to, load_partial(from, count), count);
}

// sums[element] = the sum over all partial tiles, in their order, of the `count` elements at `offset`.
template <typename Tile, typename Acc>
void wgrad_join(const WgradPartials<Tile>& partials, int64_t offset, int64_t count, Acc* sums) {
  Tile total[kMicroTileVectors * FUSEDRES_VECTOR_BYTES / sizeof(float)];
  std::copy_n(partials.first + offset, count, total);
  for (int64_t i = 1; i < partials.count; ++i) {
    const Tile* from = partials.first + i * partials.distance + offset;
    for (int64_t element = 0; element < count; ++element) total[element] += from[element];
  }
  std::copy_n(total, count, sums);
}

// One micro-tile, joined, to dw (K, taps, C). Where vectors run along C, a row of it is a run of dw; where they run
// along K, a column is. A symmetric dw takes the elements on and below the diagonal, and mirrors those below.
template <typename Tile, typename Out>
void wgrad_write_micro_tile(const WgradPlan& plan, const WgradTile& layout, int64_t j, int64_t tap, int64_t i,
                            const WgradPartials<Tile>& partials, Out* dw) {
  const int64_t rows = layout.rows.units(i), width = layout.vectors.width(j), lanes = layout.vectors.channels(j);
  const int64_t row = layout.row(i), vector = layout.vector(j), C = plan.problem.C, k_stride = plan.taps() * C;
  const bool symmetric = plan.problem.symmetric;
  acc_t<Out> sums[kMicroTileVectors * FUSEDRES_VECTOR_BYTES / sizeof(float)];
  wgrad_join(partials, layout.offset(j, tap, i), rows * width, sums);
  dw += tap * C;
  for (int64_t r = 0; r < rows && !plan.vectors_along_k; ++r) {
    const int64_t count = symmetric ? std::min(lanes, row + r + 1 - vector) : lanes;
    if (count > 0) wgrad_write_run(dw + (row + r) * k_stride + vector, sums + r * width, count);
  }
  for (int64_t lane = 0; lane < lanes && (plan.vectors_along_k || symmetric); ++lane) {
    const int64_t first = symmetric ? std::clamp<int64_t>(vector + lane + 1 - row, 0, rows) : 0;
    acc_t<Out> column[kTallRows];
    for (int64_t r = first; r < rows; ++r) column[r - first] = sums[r * width + lane];
    wgrad_write_run(dw + (vector + lane) * k_stride + row + first, column, rows - first);
  }
}

// All micro-tiles of one row panel: whole runs of dw, one row after the other.
template <typename T, typename Tile, typename Out>
void wgrad_write(const WgradPlan& plan, int64_t tile_index, int64_t row_panel, const WgradPartials<Tile>& partials,
                 Out* dw) {
  const WgradTile layout = WgradTile::of(plan, tile_index, kLanes<T>);
  if (row_panel >= layout.rows.count()) return;
  for (int64_t tap = 0; tap < layout.taps; ++tap) {
    for (int64_t j = 0; j < layout.vectors.count(); ++j) {
      if (!layout.skips(j, row_panel)) wgrad_write_micro_tile(plan, layout, j, tap, row_panel, partials, dw);
    }
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
