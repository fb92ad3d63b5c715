// How a kernel reaches memory: as it is, or through the race detector.
#pragma once

#include "emulator/block.h"

namespace fusedres::emulator {

[[noreturn, gnu::noinline]] inline void report_misaligned(size_t bytes) {
  throw std::runtime_error("emulator: " + std::to_string(bytes) + " bytes at a misaligned address");
}

// As a GPU has it: an access of some bytes is to a multiple of them.
inline void check_alignment(const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) report_misaligned(bytes);
}

// Where the bytes are that a kernel reads at `from`.
inline const void* readable(const void* from, size_t bytes) {
  check_alignment(from, bytes);
  Racecheck* race = current->block->race();
  return race ? race->read(current->linear, from, bytes) : from;
}

// Where those belong that it writes at `to`.
inline void* writable(void* to, size_t bytes) {
  check_alignment(to, bytes);
  Racecheck* race = current->block->race();
  return race ? race->write(current->linear, to, bytes) : to;
}

// `index` of a view that has `size`; the fault "shift" makes it one more.
[[gnu::noinline]] inline int checked_index(int index, int size) {
  index += current->block->shifts(reinterpret_cast<Call>(__builtin_return_address(0)));
  if (index >= 0 && index < size) return index;
  throw std::runtime_error("racecheck: index " + std::to_string(index) + " of a view of " + std::to_string(size));
}

[[gnu::always_inline]] inline int view_index(int index, int size) {
  return current->block->race() ? checked_index(index, size) : index;
}

}  // namespace fusedres::emulator
