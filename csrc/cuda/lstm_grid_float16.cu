#include "cuda/lstm_grid_kernels.h"

template struct fastseq::cuda::GridKernels<fastseq::cuda::Float16>;
