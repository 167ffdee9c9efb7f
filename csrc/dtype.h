// Element types that kernels are written for, on every device.
#pragma once

namespace flashsloth {

enum class DType { float32, float64, bfloat16, float16 };

}  // namespace flashsloth
