// AMX tiles of bfloat16: the recurrences in bfloat16, and in float32 by terms; all else is the avx512 set's.
#include "../split_recurrence.h"

namespace fastseq {
extern const RecurrentKernels kAmxKernels;
const RecurrentKernels kAmxKernels = make_split_kernels("amx");
}  // namespace fastseq
