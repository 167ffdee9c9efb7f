// Small kernels that test the instructions, on the CPU and on a GPU alike, reached by name through one C function.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.cuh"

namespace flashsloth::cuda::cases {

// What a case gets: its arrays, on the device, and whole numbers.
struct Arguments {
  std::vector<void*> arrays;
  const int* numbers;

  template <class T>
  T* array(size_t index) const {
    return static_cast<T*>(arrays.at(index));
  }
};

using Case = void (*)(const Arguments&);

inline std::map<std::string, Case>& registry() {
  static std::map<std::string, Case> cases;
  return cases;
}

struct Registered {
  Registered(const char* name, Case run) { registry()[name] = run; }
};

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace flashsloth::cuda::cases
