// The host side of the CUDA runtime, as far as the launchers and bindings use it: one device, nothing ever fails.
#include "launch_observer.h"

extern "C" {

emulation::LaunchObserver k2_launch_observer = nullptr;

cudaError_t CUDARTAPI cudaGetLastError(void) { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "error"; }
const char* CUDARTAPI cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }
cudaError_t CUDARTAPI cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t CUDARTAPI cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }

// The figures of an H100.
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) *value = 132;
  else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = 227 * 1024;
  else return cudaErrorInvalidValue;
  return cudaSuccess;
}
}
