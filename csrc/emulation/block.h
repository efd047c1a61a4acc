// Runs the threads of one block, one fiber each, and everything they wait for together.
//
// A fiber runs until it reaches a barrier or a warp collective; the scheduler then takes the next one of the same warp,
// and stays with a warp for as long as it can move: a warp runs as far ahead of the others as the barriers let it,
// which is what brings a missing barrier to light. The order of blocks, warps and lanes can be chosen.
//
// Stricter than the hardware, on purpose: collectives name the full warp, no lane or thread of a block may have left
// before a barrier or a collective, and all threads of a block wait at the same line. A violation ends the launch with
// an exception that says who waits where.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"

namespace emulation {

constexpr unsigned warp_lanes = 32;

// An asynchronous copy takes effect when it is waited for, the latest moment the hardware allows: reading too early
// yields what was there before.
struct PendingCopy {
  void* to;
  const void* from;
  unsigned bytes, group;
};

struct Thread {
  Context context;
  uint3 index{};
  unsigned linear = 0, lane = 0, warp = 0;
  const char* waits_at = nullptr;  // null: can run
  bool waits_for_block = false, finished = false;
  unsigned collectives = 0;  // how many this thread has taken part in; its parity picks the slot
  unsigned copy_group = 0;
  std::vector<PendingCopy> copies;
};

class Random {  // xorshift: an order that depends on the seed alone
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  unsigned below(unsigned limit) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<unsigned>((state_ >> 11) % limit);
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(static_cast<unsigned>(i))]);
  }

 private:
  uint64_t state_;
};

// In which order blocks, warps and lanes take their turns: as they are numbered, the other way round, or shuffled anew
// for every round. Two blocks of which one writes what the other reads meet in both orders in the first two.
class Order {
 public:
  // "reverse", or a seed; nothing, "" and "0" are the natural order.
  explicit Order(const char* text)
      : reverse_(text != nullptr && std::string(text) == "reverse"),
        seed_(text == nullptr ? 0 : std::strtoull(text, nullptr, 10)),
        random_(seed_) {}
  template <class T>
  void begin(std::vector<T>& items) {
    if (reverse_) std::reverse(items.begin(), items.end());
    next_round(items);
  }
  template <class T>
  void next_round(std::vector<T>& items) {
    if (seed_ != 0) random_.shuffle(items);
  }

 private:
  bool reverse_;
  uint64_t seed_;
  Random random_;
};

class Block {
 public:
  dim3 grid, size;
  uint3 index{};
  Thread* current = nullptr;
  SharedMemory shared;

  void run(const std::function<void()>& kernel, size_t dynamic_bytes, Order& order) {
    kernel_ = &kernel;
    shared.start_block(dynamic_bytes);
    create_threads();
    std::vector<unsigned> warps(warp_waiting_.size()), lanes(warp_lanes);
    for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
    for (unsigned i = 0; i < warp_lanes; ++i) lanes[i] = i;
    order.begin(warps), order.begin(lanes);
    while (finished_ < threads_.size()) {
      bool moved = false;
      for (unsigned warp : warps)
        while (run_warp(warp, lanes)) moved = true;
      if (!moved) fail("deadlock: " + who_waits_where());
      order.next_round(warps), order.next_round(lanes);
    }
  }

  // Everything below is called by the current fiber.
  void block_barrier(const char* site) {
    if (++block_waiting_ < threads_.size()) return wait(site, true);
    for (Thread& thread : threads_) {
      if (&thread == current) continue;
      if (std::strcmp(thread.waits_at, site) != 0)
        return stop(std::string("threads of one block wait at different barriers: ") + site + " and " +
                    thread.waits_at);
      thread.waits_at = nullptr;
    }
    block_waiting_ = 0;
  }

  void warp_barrier(const char* site) {
    if (++warp_waiting_[current->warp] < warp_lanes) return wait(site, false);
    for (unsigned lane = 0; lane < warp_lanes; ++lane) threads_[current->warp * warp_lanes + lane].waits_at = nullptr;
    warp_waiting_[current->warp] = 0;
  }

  // The value that `source_lane` of this warp passed to the same collective.
  template <class T>
  T exchange(unsigned mask, T value, unsigned source_lane, const char* site) {
    static_assert(sizeof(T) <= 16, "a warp collective moves at most 16 bytes");
    if (mask != 0xFFFFFFFFu) stop(std::string("warp collective with a partial mask at ") + site);
    const unsigned parity = current->collectives++ & 1;  // two slots: one barrier a collective is enough
    std::memcpy(slots_[current->linear].bytes[parity], &value, sizeof(T));
    warp_barrier(site);
    T received;
    std::memcpy(&received, slots_[current->warp * warp_lanes + source_lane].bytes[parity], sizeof(T));
    return received;
  }

  // Ends the launch from inside a fiber: the scheduler, on the caller's stack, throws.
  void stop(const std::string& problem) {
    problem_ = problem;
    switch_context(current->context, scheduler_);
  }

  void finish_current() {
    current->finished = true;
    ++finished_;
    switch_context(current->context, scheduler_);
  }
  void run_kernel() const { (*kernel_)(); }

 private:
  struct Slot {
    alignas(16) unsigned char bytes[2][16];
  };

  void create_threads() {
    const unsigned count = size.x * size.y * size.z;
    if (count == 0 || count > 1024 || count % warp_lanes != 0)
      fail("a block of " + std::to_string(count) + " threads; whole warps up to 1024 are supported");
    while (stacks_.size() < count) stacks_.emplace_back();
    threads_.assign(count, Thread{});
    slots_.resize(count);
    warp_waiting_.assign(count / warp_lanes, 0);
    block_waiting_ = finished_ = 0;
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = threads_[i];
      thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      thread.linear = i, thread.lane = i % warp_lanes, thread.warp = i / warp_lanes;
      prepare_context(thread.context, stacks_[i], i, enter_thread);
    }
  }

  bool run_warp(unsigned warp, const std::vector<unsigned>& lanes) {
    bool moved = false;
    for (unsigned lane : lanes) {
      Thread& thread = threads_[warp * warp_lanes + lane];
      if (thread.finished || thread.waits_at != nullptr) continue;
      current = &thread;
      switch_context(scheduler_, thread.context);
      if (!problem_.empty()) fail(std::exchange(problem_, {}));
      moved = true;
    }
    return moved;
  }

  void wait(const char* site, bool for_block) {
    current->waits_at = site;
    current->waits_for_block = for_block;
    switch_context(current->context, scheduler_);
  }

  std::string who_waits_where() const {
    std::map<std::string, unsigned> places;
    for (const Thread& thread : threads_) {
      if (thread.finished) ++places["finished"];
      else
        ++places[std::string(thread.waits_for_block ? "at the block barrier " : "at the warp collective ") +
                 thread.waits_at];
    }
    std::string text;
    for (const auto& [place, count] : places)
      text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
    return text;
  }

  [[noreturn]] void fail(const std::string& problem) {
    for (const FiberStack& stack : stacks_) stack.forget_frames();
    throw std::runtime_error("emulation: " + problem + " (block " + std::to_string(index.x) + "," +
                             std::to_string(index.y) + "," + std::to_string(index.z) + ")");
  }

  static void enter_thread();

  const std::function<void()>* kernel_ = nullptr;
  Context scheduler_;
  std::vector<FiberStack> stacks_;
  std::vector<Thread> threads_;
  std::vector<Slot> slots_;
  std::vector<unsigned> warp_waiting_;
  size_t block_waiting_ = 0, finished_ = 0;
  std::string problem_;
};

// One block at a time: the device of the emulation is this object, as it is one GPU for a kernel.
inline Block& block() {
  static Block only;
  return only;
}

inline void Block::enter_thread() {
  block().run_kernel();
  block().finish_current();
}

}  // namespace emulation
