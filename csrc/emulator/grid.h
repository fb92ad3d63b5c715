// Waiting for another block. It runs on another core or has run: one that never comes is reported.
#pragma once

#include <chrono>
#include <stdexcept>
#include <thread>

#include "emulator/block.h"

namespace fusedres::emulator {

inline void spin_until(const unsigned* counter, unsigned count) {
  using Clock = std::chrono::steady_clock;
  const auto give_up = Clock::now() + std::chrono::duration<double>(current->block->options.patience);
  while (__atomic_load_n(counter, __ATOMIC_SEQ_CST) < count) {
    if (Clock::now() > give_up) throw std::runtime_error("emulator: a block waits for one that never comes");
    std::this_thread::yield();
  }
  if (Racecheck* race = current->block->race()) race->observe(current->linear, counter);
}

// Writes what other blocks read once this one has arrived.
template <typename T>
void publish(T* to, T value) {
  *to = value;
  if (Racecheck* race = current->block->race()) race->publish(current->linear, to, sizeof(T));
}

}  // namespace fusedres::emulator
