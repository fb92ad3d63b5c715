// What the lanes of a warp do together: shuffles and votes.
#pragma once

#include <cstring>

#include "emulator/block.h"

namespace fusedres::emulator {

// Every lane gives `value` and gets the value of lane `source(lane)`, or its own where there is no such lane.
template <typename T, typename Source>
T shuffle(uint32_t mask, T value, const char* what, const Source& source) {
  struct Slot {
    T in, out;
    int from;
  } slot{value, value, source(current->lane)};
  current->block->meet(mask, what, &slot, [mask](void** slots) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Slot& mine = *static_cast<Slot*>(slots[lane]);
      if (mine.from < 0 || mine.from >= kWarpSize) continue;
      if (!(mask >> mine.from & 1)) throw std::runtime_error("emulator: a shuffle reads a lane outside its mask");
      mine.out = static_cast<Slot*>(slots[mine.from])->in;
    }
  });
  return slot.out;
}

inline uint32_t ballot(uint32_t mask, bool predicate) {
  struct Slot {
    bool in;
    uint32_t out;
  } slot{predicate, 0};
  current->block->meet(mask, "ballot", &slot, [mask](void** slots) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (mask >> lane & 1) votes |= static_cast<uint32_t>(static_cast<Slot*>(slots[lane])->in) << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (mask >> lane & 1) static_cast<Slot*>(slots[lane])->out = votes;
    }
  });
  return slot.out;
}

}  // namespace fusedres::emulator
