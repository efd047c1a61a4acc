// A block's shared memory: filled with 0xFF (a NaN in every float type) before each block, so that a value which no
// thread of this block has written shows in the result. Red zones lie between the arrays for AddressSanitizer.
#pragma once
#include <cstring>
#include <vector>

#include "fiber.h"

namespace emulation {

class SharedMemory {
 public:
  static constexpr size_t static_limit = 48 * 1024;    // what the compiler may place
  static constexpr size_t dynamic_limit = 227 * 1024;  // what a launch on sm_90 may ask for

  SharedMemory() : storage_(static_limit + dynamic_limit + 64 * red_zone) {}
  ~SharedMemory() { EMULATION_UNPOISON(storage_.data(), storage_.size()); }

  void start_block(size_t dynamic_bytes) {
    EMULATION_UNPOISON(storage_.data(), storage_.size());
    EMULATION_POISON(storage_.data(), storage_.size());
    arrays_.clear();
    next_ = aligned(storage_.data());
    static_bytes_ = 0;
    dynamic_ = place(dynamic_bytes);
  }

  void* dynamic() const { return dynamic_; }

  // `declaration` identifies one array in one kernel instance: every thread of the block gets the same memory.
  void* array(const void* declaration, size_t bytes) {
    for (const Array& known : arrays_)
      if (known.declaration == declaration) return known.memory;
    static_bytes_ += bytes;
    if (static_bytes_ > static_limit) return nullptr;
    arrays_.push_back({declaration, place(bytes)});
    return arrays_.back().memory;
  }

 private:
  struct Array {
    const void* declaration;
    void* memory;
  };
  static constexpr size_t red_zone = 128;

  static char* aligned(char* address) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(address) + 127) & ~uintptr_t{127});
  }
  char* place(size_t bytes) {
    char* memory = next_;
    EMULATION_UNPOISON(memory, bytes);
    std::memset(memory, 0xFF, bytes);
    next_ = aligned(memory + bytes + red_zone);
    return memory;
  }

  std::vector<char> storage_;
  std::vector<Array> arrays_;
  char* next_ = nullptr;
  void* dynamic_ = nullptr;
  size_t static_bytes_ = 0;
};

}  // namespace emulation
