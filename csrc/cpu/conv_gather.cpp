#include "cpu/conv_gather.h"

namespace fusedres::cpu {

GatherAxis fprop_axis(const ConvAxis& axis) {
  GatherAxis gather{axis.out, 0, 1, axis.stride, {}, {}};
  for (int64_t tap = 0; tap < axis.kernel; ++tap) {
    gather.taps.push_back(tap);
    gather.offsets.push_back(tap * axis.dilation - axis.padding);
  }
  return gather;
}

// Input i and tap t meet output q where q*stride = i + padding - t*dilation.
GatherAxis dgrad_axis(const ConvAxis& axis, int64_t first) {
  GatherAxis gather{ceil_div(axis.in - first, axis.stride), first, axis.stride, 1, {}, {}};
  for (int64_t tap = 0; tap < axis.kernel; ++tap) {
    const int64_t scaled = first + axis.padding - tap * axis.dilation;
    if (scaled % axis.stride != 0) continue;
    gather.taps.push_back(tap);
    gather.offsets.push_back(scaled / axis.stride);
  }
  return gather;
}

std::vector<Gather> dgrad_gathers(const ConvAxis& h, const ConvAxis& w) {
  std::vector<Gather> gathers;
  for (int64_t i = 0; i < std::min(h.stride, h.in); ++i) {
    for (int64_t j = 0; j < std::min(w.stride, w.in); ++j) gathers.push_back({dgrad_axis(h, i), dgrad_axis(w, j)});
  }
  return gathers;
}

}  // namespace fusedres::cpu
