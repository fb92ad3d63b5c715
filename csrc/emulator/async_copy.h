// cp.async: the destination is poison from the issue to the wait, the copy happens at the wait and no earlier.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/block.h"

namespace fusedres::emulator {

inline void cp_async(void* destination, const void* source, uint32_t bytes, uint32_t source_bytes) {
  if (reinterpret_cast<uintptr_t>(destination) % bytes != 0 ||
      (source_bytes && reinterpret_cast<uintptr_t>(source) % bytes != 0)) {
    throw std::runtime_error("emulator: cp.async to or from a misaligned address");
  }
  if (Racecheck* race = current->block->race()) {
    if (source_bytes) race->read(current->linear, source, source_bytes);
    std::memset(race->begin_copy(current->linear, destination, bytes), kPoison, bytes);
  } else {
    std::memset(destination, kPoison, bytes);
  }
  current->open.push_back({destination, source, bytes, source_bytes});
}

inline void cp_async_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

// Until at most `pending` of this thread's groups are on their way.
[[gnu::noinline]] inline void cp_async_wait(size_t pending) {
  Thread& self = *current;
  if (!self.block->takes("wait", reinterpret_cast<Call>(__builtin_return_address(0)))) return;
  Racecheck* race = self.block->race();
  ++self.waits;
  while (self.groups.size() > pending) {
    uint64_t read = 0;
    for (const AsyncCopy& copy : self.groups.front()) {
      void* to = race ? race->end_copy(self.linear, copy.destination, copy.bytes) : copy.destination;
      if (copy.source_bytes) std::memcpy(to, copy.source, copy.source_bytes);
      std::memset(static_cast<char*>(to) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
      read += copy.source_bytes;
    }
    self.block->counters.async_bytes += read;
    self.groups.pop_front();
  }
}

}  // namespace fusedres::emulator
