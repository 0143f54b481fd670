// Which instruction set serves: the best that this machine runs, or the one that FASTSEQ_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace fastseq {

// Compiled and able to run here, best first.
std::vector<const KernelTable*> runnable_kernels();
// Throws std::runtime_error where FASTSEQ_CPU_ISA names a set that was not compiled or cannot run here.
const KernelTable& current_kernels();
void use_kernels(const std::string& name);

}  // namespace fastseq
