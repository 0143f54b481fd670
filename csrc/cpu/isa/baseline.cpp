// x86-64 baseline: SSE2, 128-bit vectors.
#include "../kernels.h"

namespace fastseq {
extern const KernelTable kBaselineKernels;
const KernelTable kBaselineKernels = make_table("baseline");
}  // namespace fastseq
