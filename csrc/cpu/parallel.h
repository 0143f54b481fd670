// One parallel region per sequence, on the OpenMP runtime that torch has already loaded.
#pragma once

namespace fastseq {

using ParallelBody = void (*)(void* context, int thread, int threads);

// Runs body(context, i, n) on n threads, n <= `threads`; one thread, without a region, after a fork, since the child
// has none of the runtime's threads. Denormals are flushed to zero inside, and the caller's floating-point mode is
// restored. The body must not throw.
void run_parallel(int threads, ParallelBody body, void* context);

}  // namespace fastseq
