// What the bindings of every device share: torch's stable tensor, results to allocate, and checks.
//
// This folder is the one place that knows torch. Each file turns the tensors of one op into the struct its kernels take
// and registers it under torch.ops.flashsloth, through the libtorch stable ABI: one binary serves every torch
// from 2.10. Schemas, checks of what users pass, fake and autograd registrations live in flashsloth_ops/<op>.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace flashsloth {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checks of one op: expect(condition, "what was expected, got ", number). The public functions check what users pass
// and explain it; these checks are for raw calls of the ops, which must not read out of bounds either.
struct Expect {
  const char* op;

  template <class... Parts>
  void operator()(bool fits, const Parts&... parts) const {
    if (!fits) fail({text(parts)...});
  }

 private:
  static std::string text(const char* part) { return part; }
  static std::string text(int64_t part) { return std::to_string(part); }
  [[noreturn]] void fail(std::initializer_list<std::string> parts) const {
    std::string message = std::string(op) + ": ";
    for (const std::string& part : parts) message += part;
    throw std::runtime_error(message);
  }
};

inline DType dtype_of(const Tensor& t, const Expect& expect) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default:
      expect(t.scalar_type() == ScalarType::Float, "expected float32, float64, bfloat16 or float16 tensors");
      return DType::float32;
  }
}

// Statistics are fp32; for float64, which serves gradient checks, fp64.
inline ScalarType wide(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// Uninitialised memory on the device of `where`.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& where) {
  return torch::stable::empty(sizes, dtype, std::nullopt, where.device());
}

// Contiguous form of an input. Keep it in a variable as long as its pointer is used.
inline Tensor dense(const Tensor& t) { return torch::stable::contiguous(t); }
inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

inline void* data(const Tensor& t) { return t.mutable_data_ptr(); }
inline void* data(const std::optional<Tensor>& t) { return t ? data(*t) : nullptr; }

}  // namespace flashsloth
