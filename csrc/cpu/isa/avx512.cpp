// AVX-512 F, DQ, BW and VL: 512-bit vectors, 32 registers.
#include "../kernels.h"

namespace fastseq {
extern const KernelTable kAvx512Kernels;
const KernelTable kAvx512Kernels = make_table("avx512");
}  // namespace fastseq
