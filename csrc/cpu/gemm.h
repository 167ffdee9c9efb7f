// Matrix products, threads and scratch memory: everything the CPU kernels ask of their host.
//
// The kernels include no torch header. csrc/bindings/cpu_gemm.cpp implements these functions over torch's own
// matrix product (MKL, oneDNN) and thread pool, so there is one OpenMP runtime and torch.set_num_threads
// governs it. Whoever reuses the kernels without torch implements them over another BLAS.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace flashsloth::cpu {

// One operand of a product: row-major (rows x cols), `stride` elements from row to row. A transposed operand is
// described as it is stored and marked.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, stride;
  bool transposed = false;
};

// C = alpha * op(A) op(B) + beta * C for T = float and double. beta == 0 overwrites C, whatever it held.
// On all of torch's threads when called outside parallel_for, on the calling thread inside it.
template <class T>
void gemm(T alpha, const Matrix<const T>& a, const Matrix<const T>& b, T beta, const Matrix<T>& c);

// Calls body(begin, end) on disjoint pieces of [0, count), at least `grain` long, on torch's threads.
void parallel_for_ranges(int64_t count, int64_t grain, void (*body)(int64_t begin, int64_t end, void* context),
                         void* context);
int num_threads();

template <class F>
void parallel_for(int64_t count, int64_t grain, F&& body) {
  parallel_for_ranges(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
      },
      &body);
}

// Scratch memory of one call: 64-byte aligned, uninitialised, freed on scope exit. set_scratch_poison(true) fills
// it with NaN first, which is how the tests prove that no kernel reads what it has not written.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` elements of the block.
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(block_ + used_);
    used_ += padded<T>(count);
    return taken;
  }
  void rewind() { used_ = 0; }  // what was taken is free again
  template <class T>
  static constexpr size_t padded(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* block_;
  size_t used_ = 0;
};
void set_scratch_poison(bool on);

}  // namespace flashsloth::cpu
