// The race detector: in which order accesses to shared memory are, whatever the order they were emulated in.
//
// Every thread has a vector clock, which barriers join; an access is ordered behind another one if its thread's clock
// has reached it (Flanagan and Freund, "FastTrack", 2009). Bytes that two threads touch, one of them writing, with no
// order between are a hazard. A cp.async is ordered before nothing until its thread has waited for it.
//
// The addresses a kernel sees hold poison for good: the contents lie elsewhere, where only the primitives of
// csrc/device look. What is read around them is NaN, what is written around them is found at the end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/options.h"
#include "emulator/shared.h"

namespace fusedres::emulator {

using Times = std::vector<uint32_t>;  // how far each thread of a block has come

inline void join(Times& times, const Times& other) {
  times.resize(std::max(times.size(), other.size()));
  for (size_t i = 0; i < other.size(); ++i) times[i] = std::max(times[i], other[i]);
}

// What a thread knows to have happened: in its own block, and in others.
struct Clock {
  Times threads;
  std::map<uint64_t, Times> blocks;

  void join(const Clock& other) {
    emulator::join(threads, other.threads);
    for (const auto& [block, times] : other.blocks) emulator::join(blocks[block], times);
  }
};

// What the blocks of a launch leave for one another in global memory, and the counters by which they say so: a fence
// before an atomic operation releases, a fence behind one, or behind a read of the counter, acquires. A block that
// reads before the other one has written sees what was there: its result tells.
class GridRacecheck {
 public:
  void release(const void* counter, uint64_t block, const Clock& fenced) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& released = released_[counter];
    for (const auto& [other, times] : fenced.blocks) join(released[other], times);
    join(released[block], fenced.threads);
  }

  void observe(const void* counter, Clock& observed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [block, times] : released_[counter]) join(observed.blocks[block], times);
  }

  void write(const void* to, size_t bytes, uint64_t block, int thread, const Clock& clock) {
    const std::lock_guard<std::mutex> lock(mutex_);
    check(to, bytes, block, clock, "writes");
    const auto first = reinterpret_cast<uintptr_t>(to);
    for (size_t i = 0; i < bytes; ++i) writes_[first + i] = {block, thread, clock.threads[thread]};
    first_ = std::min(first_, first);
    last_ = std::max(last_, first + bytes);
  }

  void read(const void* from, size_t bytes, uint64_t block, const Clock& clock) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto first = reinterpret_cast<uintptr_t>(from);
    if (first < last_ && first + bytes > first_) check(from, bytes, block, clock, "reads");
  }

 private:
  struct Write {
    uint64_t block;
    int thread;
    uint32_t time;
  };

  void check(const void* at, size_t bytes, uint64_t block, const Clock& clock, const char* verb) const {
    for (size_t i = 0; i < bytes; ++i) {
      const auto found = writes_.find(reinterpret_cast<uintptr_t>(at) + i);
      if (found == writes_.end()) continue;
      const Write& write = found->second;
      const auto other = clock.blocks.find(write.block);
      const Times* times = write.block == block          ? &clock.threads
                           : other == clock.blocks.end() ? nullptr
                                                         : &other->second;
      if (times && times->size() > static_cast<size_t>(write.thread) && (*times)[write.thread] >= write.time) continue;
      std::ostringstream message;
      message << "racecheck: block " << block << " " << verb << " global memory that thread " << write.thread
              << " of block " << write.block << " has written, with no order between";
      throw std::runtime_error(message.str());
    }
  }

  std::mutex mutex_;
  std::unordered_map<const void*, std::map<uint64_t, Times>> released_;
  std::unordered_map<uintptr_t, Write> writes_;
  uintptr_t first_ = UINTPTR_MAX, last_ = 0;  // between them are all writes
};

// The shadow of a block's shared memory.
class Racecheck {
 public:
  Racecheck(SharedMemory& shared, int threads, GridRacecheck& grid)
      : shared_(shared),
        cells_(shared.size() / kGranule),
        contents_(SharedMemory::allocate(shared.size())),
        clocks_(threads),
        fenced_(threads),
        observed_(threads),
        grid_(grid) {}

  void start(uint64_t block) {
    block_ = block;
    std::fill(cells_.begin(), cells_.end(), Cell{});
    std::memset(contents_.get(), kPoison, shared_.size());
    for (size_t i = 0; i < clocks_.size(); ++i) {
      clocks_[i] = {Times(clocks_.size(), 0), {}};
      clocks_[i].threads[i] = 1;
      fenced_[i] = observed_[i] = {};
    }
    for (Clock& barrier : barriers_) barrier = {};
  }

  void finish() {
    if (!shared_.untouched()) throw std::runtime_error("racecheck: shared memory is written around csrc/device");
  }

  // A tile or a variable begins here. Nothing has been written to it.
  void open(const void* at, size_t bytes) {
    for_cells(at, bytes, [](Cell& cell) { cell.write = kUnwritten; });
  }

  // Where the bytes are that a kernel reads at `from`, or writes at `to`.
  [[gnu::noinline]] const void* read(int thread, const void* from, size_t bytes) {
    if (!shared_.holds(from)) {
      grid_.read(from, bytes, block_, clocks_[thread]);
      return from;
    }
    const Times& times = clocks_[thread].threads;
    const uint32_t now = stamp(thread);
    for_cells(from, bytes, [&](Cell& cell) {
      if (!ordered(cell.write, times)) report(thread, "reads", from, bytes, cell.write, "written", "RAW");
      if (cell.write == kUnwritten) report(thread, "reads", from, bytes, "which nobody has written");
      add_reader(cell, now, times);
    });
    return contents(from);
  }

  [[gnu::noinline]] void* write(int thread, void* to, size_t bytes) {
    if (!shared_.holds(to)) return to;
    check_write(thread, to, bytes, stamp(thread));
    return contents(to);
  }

  // A cp.async has been issued; has been waited for.
  void* begin_copy(int thread, void* to, size_t bytes) {
    if (!shared_.holds(to)) throw std::runtime_error("emulator: cp.async to global memory");
    check_write(thread, to, bytes, kNever | thread);
    return contents(to);
  }
  void* end_copy(int thread, void* to, size_t bytes) {
    for_cells(to, bytes, [now = stamp(thread)](Cell& cell) { cell.write = now; });
    return contents(to);
  }

  // bar.arrive and bar.sync: what comes before is behind the barrier for all who leave it.
  void arrive(int thread, int barrier) {
    barriers_[barrier].join(clocks_[thread]);
    ++clocks_[thread].threads[thread];
  }
  void leave(int thread, int barrier) { clocks_[thread].join(barriers_[barrier]); }
  void clear(int barrier) { barriers_[barrier] = {}; }

  // __syncwarp.
  void sync_lanes(int first, uint32_t mask) {
    Clock all;
    const auto for_lanes = [&](const auto& visit) {
      for (int lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) visit(first + lane);
      }
    };
    for_lanes([&](int thread) { all.join(clocks_[thread]); });
    for_lanes([&](int thread) {
      clocks_[thread].join(all);
      ++clocks_[thread].threads[thread];
    });
  }

  void fence(int thread) {
    clocks_[thread].join(observed_[thread]);
    fenced_[thread] = clocks_[thread];
    ++clocks_[thread].threads[thread];
  }
  void release(int thread, const void* counter) {
    if (shared_.holds(counter)) throw std::runtime_error("racecheck: atomics on shared memory are not followed");
    grid_.release(counter, block_, fenced_[thread]);
  }
  void observe(int thread, const void* counter) { grid_.observe(counter, observed_[thread]); }
  void publish(int thread, const void* to, size_t bytes) { grid_.write(to, bytes, block_, thread, clocks_[thread]); }

 private:
  // An access in 32 bits: thread, and its time above kThreadBits. Time 0: none yet, or nobody's bytes.
  static constexpr int kThreadBits = 10;
  static constexpr uint32_t kOutside = 0, kUnwritten = 1, kThreadMask = (1u << kThreadBits) - 1;
  static constexpr uint32_t kNever = ~kThreadMask;  // the time of a copy on its way
  static constexpr size_t kGranule = 2;             // bytes: the smallest element that kernels have

  // Of readers with no order between, two are kept, of different warps where they are: enough where barriers order a
  // whole block or, as __syncwarp, a warp.
  struct Cell {
    uint32_t write = kOutside;
    uint32_t reads[2] = {};
  };

  uint32_t stamp(int thread) const { return clocks_[thread].threads[thread] << kThreadBits | thread; }
  static bool ordered(uint32_t access, const Times& times) {
    return access > kUnwritten ? times[access & kThreadMask] >= access >> kThreadBits : access == kUnwritten;
  }
  static uint32_t warp_of(uint32_t access) { return (access & kThreadMask) / 32; }

  unsigned char* contents(const void* at) const { return contents_.get() + shared_.offset(at); }

  template <typename Visit>
  void for_cells(const void* at, size_t bytes, const Visit& visit) {
    const size_t first = shared_.offset(at) / kGranule, last = (shared_.offset(at) + bytes - 1) / kGranule;
    for (size_t i = first; i <= last; ++i) visit(i < cells_.size() ? cells_[i] : outside_);
  }

  static void add_reader(Cell& cell, uint32_t now, const Times& times) {
    for (uint32_t& read : cell.reads) {
      if (read && ordered(read, times)) read = 0;  // whoever is ordered behind the new reader is behind this one
    }
    uint32_t& place = cell.reads[cell.reads[0] != 0];
    if (place == 0 || warp_of(cell.reads[0]) == warp_of(cell.reads[1])) place = now;
  }

  void check_write(int thread, void* to, size_t bytes, uint32_t as) {
    const Times& times = clocks_[thread].threads;
    for_cells(to, bytes, [&](Cell& cell) {
      if (!ordered(cell.write, times)) report(thread, "writes", to, bytes, cell.write, "written", "WAW");
      for (const uint32_t read : cell.reads) {
        if (read && !ordered(read, times)) report(thread, "writes", to, bytes, read, "read", "WAR");
      }
      cell = {as, {}};
    });
  }

  [[noreturn]] void report(int thread, const char* verb, const void* at, size_t bytes, uint32_t other, const char* done,
                           const char* kind) const {
    if (other == kOutside) report(thread, verb, at, bytes, "outside of it");
    const std::string who = "thread " + std::to_string(other & kThreadMask);
    if (other >= kNever) report(thread, verb, at, bytes, "where a cp.async of " + who + " is on its way");
    report(thread, verb, at, bytes, "which " + who + " has " + done + ", with no barrier between (" + kind + ")");
  }

  [[noreturn]] void report(int thread, const char* verb, const void* at, size_t bytes, const std::string& why) const {
    std::ostringstream message;
    message << "racecheck: block " << block_ << ", thread " << thread << " " << verb << " " << bytes << " bytes of "
            << shared_.place(at) << ", " << why;
    throw std::runtime_error(message.str());
  }

  SharedMemory& shared_;
  std::vector<Cell> cells_;
  Cell outside_;
  Memory contents_;
  std::vector<Clock> clocks_, fenced_, observed_;
  Clock barriers_[16];
  GridRacecheck& grid_;
  uint64_t block_ = 0;
};

}  // namespace fusedres::emulator
