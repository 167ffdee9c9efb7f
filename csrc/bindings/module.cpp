// The Python module flashsloth_ops._C: what is no op. Importing it loads the library and so registers the ops.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace cpu = flashsloth::cpu;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and test switches; the ops themselves are under torch.ops.flashsloth.";
  m.def("cpu_isa", [] { return cpu::isa_name(cpu::isa()); }, "Instruction set the CPU kernels run with.");
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        for (cpu::Isa isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512}) {
          if (name != cpu::isa_name(isa)) continue;
          if (!cpu::set_isa(isa)) throw std::invalid_argument("isa: this processor has no " + name);
          return;
        }
        throw std::invalid_argument("isa: expected baseline, avx2 or avx512, got " + name);
      },
      "Use a lesser instruction set than the processor has.");
  m.def("set_scratch_poison", &cpu::set_scratch_poison, "Fill scratch memory with NaN before each use.");
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = FLASHSLOTH_COMPILER;
    info["torch"] = FLASHSLOTH_TORCH_VERSION;
    info["torch_target_version"] = "2.10";
#ifdef FLASHSLOTH_CUDA_ARCHS
    info["cuda"] = FLASHSLOTH_CUDA_ARCHS;
#else
    info["cuda"] = pybind11::none();
#endif
    return info;
  });
}
