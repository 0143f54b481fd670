// What the bindings call: which kernels there are, whether they fit a device, and their launches. Plain C++, compiled
// for the GPU (launch_*.cu by nvcc) and for the emulator (the same files by a C++ compiler).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/grid_layout.h"
#include "cuda/layout.h"
#include "cuda/params.h"

namespace fastseq::cuda {

// The dtype codes of fastseq.cpu.memory.STORAGE that the kernels serve.
enum class Dtype { kFloat32 = 0, kBfloat16 = 2, kFloat16 = 3 };

// A kernel of the cluster-persistent LSTM, and for how many units it is asked.
struct ClusterChoice {
  int build;  // of kBuilds
  int hidden;

  // Throws where the build has no room for so many units.
  ClusterShape shape(bool backward) const;
};

// A kernel of the grid-wide LSTM, and for which layer it is asked.
struct GridChoice {
  int groups;  // of 8 units in a block
  int batch, hidden;

  int blocks() const;
  std::size_t shared_bytes(bool backward) const;
};

// How many clusters of the kernel can be on the current device at once.
int resident_forward_clusters(Dtype dtype, bool flags, const ClusterChoice& choice);
int resident_backward_clusters(Dtype dtype, bool flags, const ClusterChoice& choice);

// How many blocks of the kernel can be.
int resident_grid_blocks(Dtype dtype, bool backward, bool flags, const GridChoice& choice);

// `clusters` share the tiles of the batch; the stream is a cudaStream_t.
void launch_cluster_forward(Dtype dtype, const ClusterChoice& choice, int clusters, const ClusterForward& p,
                            std::uintptr_t stream);
void launch_cluster_backward(Dtype dtype, const ClusterChoice& choice, int clusters, const ClusterBackward& p,
                             std::uintptr_t stream);

void launch_grid_forward(Dtype dtype, const GridChoice& choice, const GridForward& p, std::uintptr_t stream);
void launch_grid_backward(Dtype dtype, const GridChoice& choice, const GridBackward& p, std::uintptr_t stream);

// `steps` barriers of `clusters` clusters of `blocks` blocks and nothing else: what a step cannot go below.
void launch_cluster_barriers(int blocks, int clusters, int threads, std::int64_t steps, std::uintptr_t stream);

// One step of a cell. `wide`: every row of every tensor begins at a multiple of 16 bytes. `nonlinearity` counts those
// of Nonlinearity.
void launch_lstm_cell_forward(Dtype dtype, bool wide, const LstmCellForward& p, std::uintptr_t stream);
void launch_lstm_cell_backward(Dtype dtype, bool wide, const LstmCellBackward& p, std::uintptr_t stream);
void launch_rnn_cell_forward(Dtype dtype, bool wide, int nonlinearity, const RnnCellForward& p, std::uintptr_t stream);
void launch_rnn_cell_backward(Dtype dtype, bool wide, const RnnCellBackward& p, std::uintptr_t stream);

}  // namespace fastseq::cuda
