// How a kernel is run: a class with place, prepare, work, finish and threads.
#pragma once

#include "team.h"
#include "workspace.h"

namespace fastseq {
namespace {

// Measures a kernel's scratch memory, places it, and runs the kernel on its threads.
template <typename Kernel, typename Params>
void launch(const Params& p) {
  Kernel sizes(p);
  Carver measure(nullptr);
  sizes.place(measure);
  const Workspace workspace(static_cast<size_t>(measure.used()));
  Kernel kernel(p);
  Carver carver(workspace.data());
  kernel.place(carver);
  kernel.prepare();
  const ParallelBody body = [](void* self, int thread, int threads) {
    static_cast<Kernel*>(self)->work(thread, threads);
  };
  run_parallel(kernel.threads(), body, &kernel);
  kernel.finish();
}

}  // namespace
}  // namespace fastseq
