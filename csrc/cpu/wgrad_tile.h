// A tile of dw as the micro-tiles it is made of. Included by wgrad_kernels.h, per instruction set.

namespace fusedres::cpu::FUSEDRES_ISA {

// One tile: its two sides in panels, and where its micro-tiles lie, by vector panel, tap and row panel.
struct WgradTile {
  Range row_channels, vector_channels;
  WgradPanels rows, vectors;
  int64_t taps;
  bool symmetric;

  static WgradTile of(const WgradPlan& plan, int64_t tile, int64_t lanes) {
    const Range k = plan.k_range(tile), c = plan.c_range(tile);
    return of(plan, plan.vectors_along_k ? c : k, plan.vectors_along_k ? k : c, lanes);
  }

  static WgradTile of(const WgradPlan& plan, Range rows, Range vectors, int64_t lanes) {
    const bool is_wide = rows.size() <= kWideRows;
    return {rows,
            vectors,
            {rows.size(), 1, is_wide ? kWideRows : kTallRows},
            {vectors.size(), lanes, is_wide ? kWideVectors : kTallVectors},
            plan.taps(),
            plan.problem.symmetric};
  }

  int64_t micro_tiles() const { return vectors.count() * taps * rows.count(); }
  int64_t micro_tile_elements() const { return kMicroTileVectors * vectors.unit; }
  int64_t elements() const { return micro_tiles() * micro_tile_elements(); }
  int64_t offset(int64_t vector_panel, int64_t tap, int64_t row_panel) const {
    return ((vector_panel * taps + tap) * rows.count() + row_panel) * micro_tile_elements();
  }
  // The channels in front of a panel.
  int64_t row(int64_t row_panel) const { return row_channels.begin + rows.begin(row_panel); }
  int64_t vector(int64_t vector_panel) const { return vector_channels.begin + vectors.begin(vector_panel); }
  // Whether the micro-tile lies above the diagonal of a symmetric dw.
  bool skips(int64_t vector_panel, int64_t row_panel) const {
    return symmetric && row(row_panel + 1) <= vector(vector_panel);
  }
};

}  // namespace fusedres::cpu::FUSEDRES_ISA
