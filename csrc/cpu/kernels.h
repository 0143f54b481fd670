// Every kernel of one instruction set, as the table that its object file exports. isa/*.cpp include this and nothing
// else.
#pragma once

#include "clustering.h"
#include "launch.h"
#include "nearest.h"
#include "norm_recurrence.h"
#include "peaks.h"
#include "recurrence.h"
#include "step.h"
#include "target.h"

namespace fastseq {
namespace {

template <template <typename, typename, Flags> class Kernel, typename Cell, typename Real, typename Params>
void dispatch_flags(const Params& p) {
  if (p.options)
    launch<Kernel<Cell, Real, kWithOptions>>(p);
  else if (p.flags)
    run_by_length(p, Cell::kGates, layer_cut<Cell, Real>(p), &launch<Kernel<Cell, Real, kWithFlags>>);
  else
    launch<Kernel<Cell, Real, kNoFlags>>(p);
}

template <template <typename, typename, Flags> class Kernel, typename Cell, typename Params>
void dispatch(const Params& p) {
  p.storage == Storage::kFloat64 ? dispatch_flags<Kernel, Cell, double>(p) : dispatch_flags<Kernel, Cell, float>(p);
}

inline void lstm_forward(const ForwardParams& p) {
  if (!normalises(p.options)) return dispatch<RecurrentForward, LstmCell>(p);
  p.storage == Storage::kFloat64 ? launch<NormForward<double>>(p) : launch<NormForward<float>>(p);
}
inline void lstm_backward(const BackwardParams& p) {
  if (!normalises(p.options)) return dispatch<RecurrentBackward, LstmCell>(p);
  p.storage == Storage::kFloat64 ? launch<NormBackward<double>>(p) : launch<NormBackward<float>>(p);
}

inline void cluster(const ClusterParams& p) {
  const bool unit = p.alpha == 1;
  if (p.storage == Storage::kFloat64)
    unit ? launch<Clustering<double, true>>(p) : launch<Clustering<double, false>>(p);
  else
    unit ? launch<Clustering<float, true>>(p) : launch<Clustering<float, false>>(p);
}

template <template <typename> class Kernel, typename Params>
void dispatch_storage(const Params& p) {
  p.storage == Storage::kFloat64 ? launch<Kernel<double>>(p) : launch<Kernel<float>>(p);
}

constexpr KernelTable make_table(const char* name) {
  return {name,
          &lstm_forward,
          &lstm_backward,
          &dispatch<RecurrentForward, ElmanCell, ForwardParams>,
          &dispatch<RecurrentBackward, ElmanCell, BackwardParams>,
          &step_bytes,
          &step_pack,
          &step,
          &cluster,
          &dispatch_storage<NearestCenter, NearestParams>,
          &dispatch_storage<TargetDistribution, TargetParams>,
          &fma_loop,
          &read_loop};
}

}  // namespace
}  // namespace fastseq
