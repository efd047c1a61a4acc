// Hands launches to somebody else, who runs them in the emulation's place: the tests' interpreter of PTX, to which this
// gives what a GPU would get, from the same host code (tests/kernels/ptx/launches.py).
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <tuple>

namespace emulation {

// The kernel's address, grid and block in x, y, z, and of each parameter its address and its size.
using LaunchObserver = void (*)(const void* kernel, const unsigned* grid_and_block, size_t shared_bytes,
                                const void* const* parameters, const size_t* sizes, size_t count);

template <class... Parameters, class... Arguments>
void show_launch(LaunchObserver observer, void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes,
                 Arguments... arguments) {
  const std::tuple<Parameters...> values(arguments...);  // converted as the call of the kernel converts them
  const unsigned shape[6] = {grid.x, grid.y, grid.z, size.x, size.y, size.z};
  const std::array<size_t, sizeof...(Parameters)> sizes{sizeof(Parameters)...};
  std::apply(
      [&](const auto&... value) {
        const std::array<const void*, sizeof...(Parameters)> addresses{static_cast<const void*>(&value)...};
        observer(reinterpret_cast<const void*>(kernel), shape, shared_bytes, addresses.data(), sizes.data(),
                 sizes.size());
      },
      values);
}

}  // namespace emulation

// Null: the emulation runs the kernels itself. Set by name, from Python.
extern "C" emulation::LaunchObserver k2_launch_observer;
