// How a gather is cut into tasks: blocks of points by blocks of output channels, each running over the whole depth. A
// point is a pixel or, under Winograd's algorithm, a square of 2x2 pixels.
#pragma once

#include "cpu/isa.h"
#include "cpu/winograd.h"

namespace fusedres::cpu {

// What a micro-tile of an instruction set holds: points by channels (a panel of the packed weight).
struct ConvTile {
  Isa isa;
  int64_t points, channels;
};

// `depth` elements are read at each tap; input pixels lie in_pixel elements apart.
struct ConvSizes {
  int64_t N, K;
  int64_t in_h, in_w, in_pixel, depth;
  int64_t out_h, out_w;
};

// A weight as it lies in memory, or its panels.
enum class Weights { kLoose, kPacked };

struct ConvPlan {
  ConvPlan(const ConvSizes& sizes, Gather gather, ConvTile tile, int64_t workers, Weights weights);

  int64_t points() const { return sizes.N * points_of_image(); }
  int64_t points_of_image() const { return winograd ? winograd->squares() : gather.pixels(); }
  int64_t tasks() const { return tile_blocks.count * panel_blocks.count; }
  // All tiles of a block are full, but for the end of the last one.
  Range point_block(int64_t i) const {
    const Range tiles = tile_blocks[i];
    return clip({tiles.begin * tile.points, tiles.end * tile.points}, points());
  }
  // Of a panel, between frequencies: an odd number of rows, for what meets all sixteen to meet sixteen sets of the
  // cache.
  int64_t frequency_elements() const { return (sizes.depth | 1) * tile.channels; }
  int64_t panel_elements() const {
    return winograd ? kFrequencies * frequency_elements() : gather.taps() * sizes.depth * tile.channels;
  }
  int64_t packed_elements() const { return panels * panel_elements(); }

  ConvSizes sizes;
  Gather gather;
  std::optional<WinogradGrid> winograd;  // or the direct sum
  ConvTile tile;
  int64_t panels;
  Cut tile_blocks;       // of the tiles that hold the points of all images
  Cut panel_blocks;      // of the panels
  Cut runs;              // of a tap's depth
  int64_t taps_at_once;  // in one run, where runs are whole taps
  bool packs_panels;     // where they are used, run by run: each is used once
};

}  // namespace fusedres::cpu
