// The matrix product and the threads of torch for the CPU kernels (see cpu/gemm.h).
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <type_traits>

#include "bindings/tensor.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"

// oneDNN's linear layer in torch's C interface for compiled models; weak, as builds of torch without oneDNN lack it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t num_scalars, const char** algorithm, AtenTensorHandle* result);

namespace flashsloth::cpu {

namespace {

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// A tensor over memory of ours. Torch reads sizes and strides, so a transposed operand is only described.
template <class T>
Tensor wrap(const Matrix<T>& m) {
  const int64_t sizes[] = {m.transposed ? m.cols : m.rows, m.transposed ? m.rows : m.cols};
  const int64_t strides[] = {m.transposed ? 1 : m.stride, m.transposed ? m.stride : 1};
  return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(m.data), {sizes, 2}, {strides, 2}, kCpu,
                                  scalar_type<std::remove_const_t<T>>);
}

// Torch gives fp32 products to MKL, which takes its AVX-512 paths on Intel processors only: elsewhere oneDNN, also in
// torch, is twice as fast. It wants dense operands and makes its own result, so small products are not worth it.
bool onednn_is_faster(const Matrix<const float>& a, const Matrix<const float>& b) {
#if defined(__x86_64__)
  static const bool foreign = detected_isa() == Isa::avx512 && !__builtin_cpu_is("intel");
  const double work = 1.0 * a.rows * a.cols * (b.transposed ? b.rows : b.cols);
  return foreign && &aoti_torch_cpu__linear_pointwise != nullptr && work >= 1 << 20 && a.stride == a.cols &&
         b.stride == b.cols;
#else
  return false;
#endif
}

// C = alpha * op(A) op(B) + beta * C by oneDNN, whose linear layer multiplies with the transpose of its weight.
void onednn_gemm(float alpha, const Matrix<const float>& a, Matrix<const float> b, float beta, const Matrix<float>& c) {
  b.transposed = !b.transposed;
  const Tensor ta = wrap(a), tb = wrap(b);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(ta.get(), tb.get(), nullptr, "none", nullptr, 0, nullptr, &handle));
  const Tensor product(handle);
  const float* from = static_cast<const float*>(product.const_data_ptr());
  for (int64_t i = 0; i < c.rows; ++i) {
    const float* source = from + i * c.cols;
    float* row = c.data + i * c.stride;
    if (alpha == 1 && beta == 0) {
      std::copy_n(source, c.cols, row);
    } else if (beta == 0) {
      for (int64_t j = 0; j < c.cols; ++j) row[j] = alpha * source[j];
    } else {
      for (int64_t j = 0; j < c.cols; ++j) row[j] = alpha * source[j] + beta * row[j];
    }
  }
}

}  // namespace

template <class T>
void gemm(T alpha, const Matrix<const T>& a, const Matrix<const T>& b, T beta, const Matrix<T>& c) {
  if constexpr (std::is_same_v<T, float>) {
    if (onednn_is_faster(a, b)) return onednn_gemm(alpha, a, b, beta, c);
  }
  const Tensor ta = wrap(a), tb = wrap(b), tc = wrap(c);
  if (alpha == T(1) && beta == T(0)) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(tc.get(), ta.get(), tb.get()));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(tc.get(), tc.get(), ta.get(), tb.get(), beta, alpha));
  }
}
template void gemm(float, const Matrix<const float>&, const Matrix<const float>&, float, const Matrix<float>&);
template void gemm(double, const Matrix<const double>&, const Matrix<const double>&, double, const Matrix<double>&);

void parallel_for_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count > 0) STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}
int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace flashsloth::cpu
