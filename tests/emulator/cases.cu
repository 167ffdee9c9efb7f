// The C function through which cases run: arrays go to the device, the case runs, and all of them come back.
#include "cases.h"

using namespace flashsloth::cuda::cases;

extern "C" __attribute__((visibility("default"))) const char* run_case(const char* name, void* const* arrays,
                                                                       const int64_t* bytes, int count,
                                                                       const int* numbers) {
  static std::string message;
  Arguments arguments{{}, numbers};
  try {
    const auto found = registry().find(name);
    if (found == registry().end()) throw std::runtime_error(std::string("no case ") + name);
    for (int i = 0; i < count; ++i) {
      void* device = nullptr;
      check(cudaMalloc(&device, static_cast<size_t>(bytes[i])));
      arguments.arrays.push_back(device);
      check(cudaMemcpy(device, arrays[i], static_cast<size_t>(bytes[i]), cudaMemcpyHostToDevice));
    }
    found->second(arguments);
    check(cudaDeviceSynchronize());
    for (int i = 0; i < count; ++i)
      check(cudaMemcpy(arrays[i], arguments.arrays[static_cast<size_t>(i)], static_cast<size_t>(bytes[i]),
                       cudaMemcpyDeviceToHost));
    message.clear();
  } catch (const std::exception& error) {
    message = error.what();
  }
  for (void* device : arguments.arrays) cudaFree(device);
  return message.empty() ? nullptr : message.c_str();
}
