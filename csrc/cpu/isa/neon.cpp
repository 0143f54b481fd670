// arm64: NEON, 128-bit vectors, 32 registers.
#include "../kernels.h"

namespace fastseq {
extern const KernelTable kNeonKernels;
const KernelTable kNeonKernels = make_table("neon");
}  // namespace fastseq
