// k2_megatron._cpu.AesLanes: the hash of ops.h as an object that takes its input in pieces of any length, as hashlib's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace k2 {

// The instruction set's own part: whole stripes, and the end.
struct AesLanesParts {
  void (*absorb)(void* lanes, const void* data, int64_t stripes, int threads);
  void (*digest)(const void* lanes, int64_t bytes, void* digest, int threads);
};

class AesLanes {
 public:
  explicit AesLanes(AesLanesParts parts) : parts_(parts) {
    constexpr int kStartRounds = 10;
    for (int lane = 0; lane < kLanes; ++lane) lanes_[lane * kWord] = static_cast<unsigned char>(lane + 1);
    for (int round = 0; round < kStartRounds; ++round) parts_.absorb(lanes_, rest_, 1, 1);  // of zeros
  }

  void update(const void* data, int64_t size) {
    const unsigned char* at = static_cast<const unsigned char*>(data);
    const int64_t held = bytes_ % kStripe;
    bytes_ += size;
    if (held) {
      const int64_t taken = size < kStripe - held ? size : kStripe - held;
      std::memcpy(rest_ + held, at, static_cast<size_t>(taken));
      if (held + taken < kStripe) return;
      parts_.absorb(lanes_, rest_, 1, 1);
      at += taken;
      size -= taken;
    }
    parts_.absorb(lanes_, at, size / kStripe, 1);
    std::memcpy(rest_, at + size / kStripe * kStripe, static_cast<size_t>(size % kStripe));
  }

  std::string hexdigest() const {
    AesLanes end = *this;  // more may follow
    if (const int64_t held = bytes_ % kStripe) {
      std::memset(end.rest_ + held, 0, static_cast<size_t>(kStripe - held));
      parts_.absorb(end.lanes_, end.rest_, 1, 1);
    }
    unsigned char digest[kWord];
    parts_.digest(end.lanes_, bytes_, digest, 1);
    std::string text;
    for (const unsigned char byte : digest) {
      text += "0123456789abcdef"[byte >> 4];
      text += "0123456789abcdef"[byte & 15];
    }
    return text;
  }

 private:
  static constexpr int kLanes = 32, kWord = 16, kStripe = kLanes * kWord;

  AesLanesParts parts_;
  int64_t bytes_ = 0;
  alignas(64) unsigned char lanes_[kStripe] = {};
  alignas(64) unsigned char rest_[kStripe] = {};  // the beginning of a stripe
};

// The GIL is kept: a block of a file takes microseconds, and whoever gives it away waits up to 5 ms to have it back.
inline void bind_aes_lanes(pybind11::module_& module, AesLanesParts parts) {
  pybind11::class_<AesLanes>(module, "AesLanes")
      .def(pybind11::init([parts] { return AesLanes(parts); }))
      .def("update",
           [](AesLanes& hash, const pybind11::buffer& data) {
             Py_buffer view;
             if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw pybind11::error_already_set();
             hash.update(view.buf, view.len);
             PyBuffer_Release(&view);
           })
      .def("hexdigest", &AesLanes::hexdigest);
}

}  // namespace k2
