// Memory that is kept from call to call: scratch of the kernels, and the tape between a forward and its backward.
//
// Fresh pages cost more than the arithmetic on many shapes (about a microsecond each, and a training step of a long
// sequence needs a hundred thousand), so freed blocks stay in one pool of the process and are handed out again. Blocks
// are aligned to 2 MiB and offered to the kernel for huge pages: a column of a row-major matrix otherwise touches one
// page a row.
#pragma once

#include <cstddef>

namespace fastseq {

// One block, back to the pool when it goes out of scope. Any thread may make or destroy one.
class Workspace {
 public:
  // Throws std::bad_alloc. The contents are undefined.
  explicit Workspace(std::size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  char* data_;
  std::size_t size_;
};

// Bytes that the pool keeps for later, and their release to the operating system.
std::size_t idle_bytes();
void release_idle();

// Asks for huge pages under an array that was allocated elsewhere and not yet written: a hint.
void advise_huge_pages(void* data, std::size_t bytes);

}  // namespace fastseq
