// What a kernel asks of the machine: who it is, barriers, the tensor cores, memory of other blocks, the copy engine.
// nvcc takes the instructions, any other compiler the emulator, which runs the very same kernels on a CPU.
#pragma once

#if defined(__CUDACC__)
#include "cuda/machine_gpu.h"
#else
#include "cuda/emulated/machine.h"
#endif
