// AVX-512 with the bfloat16 dot product: the recurrences in bfloat16; all else is the avx512 set's.
#include "../bf16_recurrence.h"

namespace fastseq {
extern const RecurrentKernels kAvx512_bf16Kernels;
const RecurrentKernels kAvx512_bf16Kernels = make_bf16_kernels("avx512_bf16");
}  // namespace fastseq
