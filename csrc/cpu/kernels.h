// Every kernel of one instruction set, as the table that its object file exports. isa/*.cpp include this and nothing
// else.
#pragma once

#include "peaks.h"
#include "recurrence.h"

namespace fastseq {
namespace {

template <template <typename, typename, bool> class Kernel, typename Cell, typename Params>
void dispatch(const Params& p) {
  if (p.storage == Storage::kFloat64)
    p.flags ? launch<Kernel<Cell, double, true>>(p) : launch<Kernel<Cell, double, false>>(p);
  else
    p.flags ? launch<Kernel<Cell, float, true>>(p) : launch<Kernel<Cell, float, false>>(p);
}

constexpr KernelTable make_table(const char* name) {
  return {name,
          &dispatch<RecurrentForward, LstmCell, ForwardParams>,
          &dispatch<RecurrentBackward, LstmCell, BackwardParams>,
          &dispatch<RecurrentForward, ElmanCell, ForwardParams>,
          &dispatch<RecurrentBackward, ElmanCell, BackwardParams>,
          &fma_loop,
          &read_loop};
}

}  // namespace
}  // namespace fastseq
