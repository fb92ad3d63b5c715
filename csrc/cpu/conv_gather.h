// A convolution as gathers. A gather is a grid of output pixels that all meet the same taps: at each tap a pixel reads
// the channels of one input pixel. A forward conv is one gather. The input gradient of a strided conv is one for every
// residue of the pixel's coordinates modulo the stride, with just the taps that meet it.
#pragma once

#include <vector>

#include "cpu/geometry.h"

namespace fusedres::cpu {

// Grid point i is output out_begin + i*out_step, and meets taps[t] at input i*in_step + offsets[t] if that is inside.
struct GatherAxis {
  int64_t points, out_begin, out_step, in_step;
  std::vector<int64_t> taps, offsets;
};

struct Gather {
  GatherAxis h, w;

  int64_t pixels() const { return h.points * w.points; }  // of one image
  int64_t taps() const { return static_cast<int64_t>(h.taps.size() * w.taps.size()); }
};

GatherAxis fprop_axis(const ConvAxis& axis);

// Inputs first, first + stride, ... of the conv's axis, as outputs of its gradient.
GatherAxis dgrad_axis(const ConvAxis& axis, int64_t first);

// All gathers of an input gradient; every input pixel belongs to one.
std::vector<Gather> dgrad_gathers(const ConvAxis& h, const ConvAxis& w);

}  // namespace fusedres::cpu
