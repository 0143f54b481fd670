// AVX2 with FMA and F16C: 256-bit vectors, 16 registers.
#include "../kernels.h"

namespace fastseq {
extern const KernelTable kAvx2Kernels;
const KernelTable kAvx2Kernels = make_table("avx2");
}  // namespace fastseq
