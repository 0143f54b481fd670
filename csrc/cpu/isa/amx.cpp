// AMX tiles of bfloat16: the recurrences in bfloat16; all else is the avx512 set's.
#include "../bf16_recurrence.h"

namespace fastseq {
extern const RecurrentKernels kAmxKernels;
const RecurrentKernels kAmxKernels = make_bf16_kernels("amx");
}  // namespace fastseq
