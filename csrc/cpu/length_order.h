// Sequences of unequal length, in an order in which they end tile by tile.
//
// A tile of the batch is skipped at a step where all of its rows have ended. Where lengths are mixed hardly one is, so
// a layer may run on copies, longest first, and hand back its results in the caller's order.
#pragma once

#include "params.h"

namespace fastseq {

// How a kernel cuts the batch. It depends on the sizes alone.
struct BatchCut {
  int64_t most;  // rows of a tile at most
  bool shared;   // whether two threads work on the same tiles, and do not take one each
};

// Runs a kernel of a layer with flags and without options; where `any_order` allows it and it saves more than it costs,
// on copies in the order of length. The tape is then in that order too and says so; the backward goes by what the tape
// says, whatever it would choose itself. gates: 4, or 1 of an Elman layer.
void run_by_length(const ForwardParams& p, int64_t gates, BatchCut cut, ForwardFn kernel);
void run_by_length(const BackwardParams& p, int64_t gates, BatchCut, BackwardFn kernel);

}  // namespace fastseq
