// A thread block on the CPU: its threads as fibers, its shared memory, its barriers, and the scheduler that runs them.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/options.h"
#include "emulator/racecheck.h"
#include "emulator/shared.h"

namespace fusedres::emulator {

constexpr int kWarpSize = 32;
constexpr int kBarriers = 16;

class Block;

// A cp.async on its way: nothing has arrived yet.
struct AsyncCopy {
  void* destination;
  const void* source;
  uint32_t bytes, source_bytes;
};

struct Thread {
  Dim3 index;
  int linear = 0, warp = 0, lane = 0;
  Block* block = nullptr;
  bool exited = false;
  const char* waits_for = nullptr;
  Fiber fiber;
  std::vector<AsyncCopy> open;                // issued since the last commit
  std::deque<std::vector<AsyncCopy>> groups;  // committed, oldest first
  int64_t barriers = 0, waits = 0;
};

// The CUDA thread that runs on this core now. A block stays on one core, so no fiber sees this change under it.
inline thread_local Thread* current = nullptr;

// Lanes of a warp that meet: each leaves a pointer to its operands, the last one acts for all.
struct Meeting {
  uint32_t mask, arrived = 0;
  const char* what;
  void* slots[kWarpSize] = {};
};

struct Warp {
  uint32_t ready = 0, live = 0;
  std::vector<Meeting*> meetings;
};

struct NamedBarrier {
  int arrived = 0;
  std::vector<Thread*> waiting;
};

class Block {
 public:
  Block(Dim3 grid, Dim3 shape, size_t shared_bytes, const Options& options, Counters& counters, GridRacecheck& others)
      : grid(grid),
        shape(shape),
        shared_bytes(shared_bytes),
        options(options),
        counters(counters),
        shared_(shared_bytes) {
    const int count = static_cast<int>(shape.count());
    if (count < 1 || count > 1024) throw std::runtime_error("emulator: a block has 1 to 1024 threads");
    threads_ = std::vector<Thread>(count);
    stacks_ = std::vector<Stack>(count);
    if (options.racecheck) race_ = std::make_unique<Racecheck>(shared_, count, others);
  }

  // Runs every thread of the block at `index` to its end.
  void run(Dim3 index, const std::function<void()>& kernel) {
    this->index = index;
    kernel_ = &kernel;
    error_ = nullptr;
    const uint64_t number = (uint64_t{index.z} * grid.y + index.y) * grid.x + index.x;
    random_.seed(options.seed * 0x9E3779B97F4A7C15u + number);
    shared_.reset();
    if (race_) race_->start(number);
    start_threads();
    schedule();
    if (error_) std::rethrow_exception(error_);
    if (race_) race_->finish();
    counters.barriers += threads_[0].barriers;
    counters.waits += threads_[0].waits;
    const std::lock_guard<std::mutex> lock(counters.mutex);
    counters.calls.insert(calls_.begin(), calls_.end());
  }

  void wait(const char* reason) {
    Thread* self = current;
    self->waits_for = reason;
    self->fiber.yield();
    self->waits_for = nullptr;
  }

  void wake(Thread& thread) { warps_[thread.warp].ready |= 1u << thread.lane; }

  // bar.sync: blocks until `expected` threads have come; bar.arrive does not block.
  void barrier(int id, int expected, bool blocks, const char* reason) {
    NamedBarrier& barrier = barriers_[id];
    if (race_) race_->arrive(current->linear, id);
    if (blocks) barrier.waiting.push_back(current);
    if (++barrier.arrived >= expected) {
      release(id);
      if (blocks) return;
    }
    if (blocks) {
      sleep();
      wait(reason);
    }
  }

  // Whether the call of a barrier, a wait or a fence that returns to `call` takes place.
  bool takes(const char* what, Call call) {
    if (race_) calls_.emplace(call, what);
    return call != options.drop;
  }

  // What the fault "shift" adds to an index.
  int shifts(Call call) {
    calls_.emplace(call, "view");
    return call == options.shift;
  }

  [[gnu::noinline]] void block_barrier() {
    if (!takes("barrier", reinterpret_cast<Call>(__builtin_return_address(0)))) return;
    ++current->barriers;
    barrier(0, live_, true, "__syncthreads");
  }

  // Blocks until all lanes of `mask` have come; `act(slots)` runs once, when the last one has.
  template <typename Act>
  void meet(uint32_t mask, const char* what, void* slot, const Act& act) {
    Thread* self = current;
    Warp& warp = warps_[self->warp];
    const uint32_t bit = 1u << self->lane;
    if (!(mask & bit)) throw std::runtime_error(std::string("emulator: a lane calls ") + what + " outside its mask");
    if (mask & ~warp.live) throw std::runtime_error(std::string("emulator: the mask of ") + what + " names dead lanes");
    Meeting here{mask, 0, what};
    Meeting* meeting = nullptr;
    for (Meeting* other : warp.meetings) {
      if (other->mask == mask) meeting = other;
    }
    if (meeting == nullptr) warp.meetings.push_back(meeting = &here);
    if (std::strcmp(meeting->what, what) != 0) {
      throw std::runtime_error(std::string("emulator: lanes of one warp are at ") + what + " and at " + meeting->what);
    }
    meeting->arrived |= bit;
    meeting->slots[self->lane] = slot;
    if (meeting->arrived != mask) {
      sleep();
      return wait(what);
    }
    act(meeting->slots);
    warp.meetings.erase(std::find(warp.meetings.begin(), warp.meetings.end(), meeting));
    warp.ready |= mask;
  }

  // __syncwarp orders what the lanes of `mask` do.
  void sync_lanes(uint32_t mask) {
    if (race_) race_->sync_lanes(current->warp * kWarpSize, mask);
  }

  Racecheck* race() const { return race_.get(); }

  void* tile(size_t offset, size_t bytes) { return opened(shared_.tile(offset, bytes), bytes); }
  void* variable(const void* tag, size_t bytes) { return opened(shared_.variable(tag, bytes), bytes); }

  Dim3 grid, shape, index;
  const size_t shared_bytes;
  const Options& options;
  Counters& counters;

 private:
  void* opened(std::pair<void*, bool> part, size_t bytes) {
    if (race_ && part.second) race_->open(part.first, bytes);
    return part.first;
  }

  void start_threads() {
    const int count = static_cast<int>(threads_.size());
    warps_.assign((count + kWarpSize - 1) / kWarpSize, {});
    for (NamedBarrier& barrier : barriers_) barrier = {};
    live_ = count;
    for (int i = 0; i < count; ++i) {
      Thread& thread = threads_[i];
      thread = {};
      thread.linear = i;
      thread.index = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
      thread.warp = i / kWarpSize;
      thread.lane = i % kWarpSize;
      thread.block = this;
      warps_[thread.warp].live |= 1u << thread.lane;
      wake(thread);
      thread.fiber.start(stacks_[i], &Block::thread_main, &thread);
    }
  }

  static void thread_main(void* argument) {
    Thread* self = static_cast<Thread*>(argument);
    Block* block = self->block;
    try {
      (*block->kernel_)();
      const bool pending = std::any_of(self->groups.begin(), self->groups.end(), [](auto& g) { return !g.empty(); });
      if (pending || !self->open.empty()) throw std::runtime_error("emulator: a thread ends before its cp.async");
    } catch (...) {
      if (!block->error_) block->error_ = std::current_exception();
    }
    block->end_of(*self);
    self->fiber.exit();
  }

  void end_of(Thread& thread) {
    thread.exited = true;
    warps_[thread.warp].live &= ~(1u << thread.lane);
    sleep();
    --live_;
    if (barriers_[0].arrived > 0 && barriers_[0].arrived >= live_) release(0);
  }

  void sleep() { warps_[current->warp].ready &= ~(1u << current->lane); }

  void release(int id) {
    for (Thread* thread : barriers_[id].waiting) {
      wake(*thread);
      if (race_) race_->leave(thread->linear, id);
    }
    barriers_[id] = {};
    if (race_) race_->clear(id);
  }

  void schedule() {
    while (live_ > 0 && !error_) {
      const int warp = next_warp();
      if (warp < 0) return report_deadlock();
      run_lanes(warp);
    }
    current = nullptr;
  }

  int next_warp() {
    const int count = static_cast<int>(warps_.size());
    const int first = options.order == Order::seeded ? static_cast<int>(random_() % count) : 0;
    for (int i = 0; i < count; ++i) {
      const int warp = options.order == Order::reverse ? count - 1 - i : (first + i) % count;
      if (warps_[warp].ready) return warp;
    }
    return -1;
  }

  // Each lane that can run does, up to where it waits; in a seeded order they begin anywhere and some have to wait.
  void run_lanes(int warp) {
    const uint32_t chosen =
        options.order == Order::seeded ? static_cast<uint32_t>(random_()) | 1u << random_() % 32 : ~0u;
    const int first = options.order == Order::seeded ? static_cast<int>(random_() % kWarpSize) : 0;
    for (int i = 0; i < kWarpSize && !error_; ++i) {
      const int lane = options.order == Order::reverse ? kWarpSize - 1 - i : (first + i) % kWarpSize;
      if (!(warps_[warp].ready & chosen & 1u << lane)) continue;
      current = &threads_[warp * kWarpSize + lane];
      current->fiber.resume();
    }
  }

  void report_deadlock() {
    std::unordered_map<std::string, int> waiting;
    for (const Thread& thread : threads_) {
      if (!thread.exited) ++waiting[thread.waits_for ? thread.waits_for : "nothing"];
    }
    std::ostringstream message;
    message << "emulator: deadlock:";
    for (const auto& [reason, count] : waiting) message << " " << count << " threads at " << reason << ";";
    current = nullptr;
    error_ = std::make_exception_ptr(std::runtime_error(message.str()));
  }

  std::vector<Thread> threads_;
  std::vector<Stack> stacks_;
  std::vector<Warp> warps_;
  NamedBarrier barriers_[kBarriers];
  SharedMemory shared_;
  std::unique_ptr<Racecheck> race_;
  std::map<Call, const char*> calls_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr error_;
  std::mt19937_64 random_;
  int live_ = 0;
};

}  // namespace fusedres::emulator
