#include "cuda/lstm_cluster_backward_kernels.h"

template struct fastseq::cuda::BackwardKernels<fastseq::cuda::Float16>;
