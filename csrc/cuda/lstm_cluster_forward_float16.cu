#include "cuda/lstm_cluster_forward_kernels.h"

template struct fastseq::cuda::ForwardKernels<fastseq::cuda::Float16>;
