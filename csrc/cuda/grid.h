// What both passes of the grid-wide LSTM share: waiting for all blocks, and the rows that they have written.
#pragma once

#include "cuda/cluster.h"
#include "cuda/grid_layout.h"

namespace fastseq::cuda {

// Waits until every block has published `step`: each has one signal of its own, so that none waits to write.
FASTSEQ_DEVICE void await_all(const std::uint32_t* signals, int step) {
  for (int i = machine::thread(); i < machine::blocks(); i += machine::block_threads())
    machine::await(signals + i, static_cast<std::uint32_t>(step));
  machine::block_barrier();
}

// Makes what the threads of this block have stored for others seen by all who wait for `step`.
FASTSEQ_DEVICE void publish_all(std::uint32_t* signals, int step) {
  machine::block_barrier();
  if (machine::thread() == 0) machine::publish(signals + machine::block(), static_cast<std::uint32_t>(step));
}

// Eight numbers of a row that another block may have written, from an address of 16 bytes; zero where there are none.
template <typename Bits>
FASTSEQ_DEVICE machine::Words4 eight_numbers(const Bits* row, int k, bool present) {
  if (!present) return machine::Words4{0u, 0u, 0u, 0u};
  return machine::load_published(reinterpret_cast<const machine::Words4*>(row + k));
}

}  // namespace fastseq::cuda
