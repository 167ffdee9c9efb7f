// One binary for every x86-64. Each kernel file is compiled once per instruction set, inside a namespace named by
// the macro FLASHSLOTH_ISA; csrc/cpu/dispatch.cpp calls the one the processor has.
#pragma once

namespace flashsloth::cpu {

enum class Isa { baseline, avx2, avx512 };  // ascending: each includes the one before

Isa detected_isa();        // the best the processor has
Isa isa();                 // the set in use: the best the processor has, unless set_isa lowered it
bool set_isa(Isa wanted);  // false, and no change, when the processor lacks it
const char* isa_name(Isa which);

}  // namespace flashsloth::cpu
