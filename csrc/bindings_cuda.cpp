// k2_megatron._cuda: the operations of ops.h on NVIDIA GPUs. Imports anywhere: the CUDA runtime is linked statically
// and finds the driver on first use.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "bindings.h"

void k2::report(const char* name, int status) {
  const auto error = static_cast<cudaError_t>(status);
  throw std::runtime_error(std::string(name) + ": CUDA error " + std::to_string(status) + " (" +
                           cudaGetErrorName(error) + "): " + cudaGetErrorString(error));
}

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of k2_megatron (csrc/ops.h): addresses in, nothing checked. Use k2_megatron.kernels.";
  module.attr("architectures") = K2_CUDA_ARCHITECTURES;
  // The number of CUDA devices; 0 where there is no device or no driver.
  module.def("device_count", [] {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
  });
#define K2_BIND(NAME) k2::bind(module, #NAME, &k2::cuda::NAME);
  K2_BIND_ALL(K2_BIND)
}
