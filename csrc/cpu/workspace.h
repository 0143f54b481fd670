// Scratch memory that is kept from call to call, one block per calling thread.
//
// Fresh pages cost more than the arithmetic on small shapes, so a block is reused while it is large enough. It is
// aligned to 2 MiB and offered to the kernel for huge pages: a column of a row-major matrix otherwise touches one page
// a row.
#pragma once

#include <cstddef>

namespace fastseq {

class Workspace {
 public:
  // Throws std::bad_alloc. The contents are undefined.
  explicit Workspace(std::size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

}  // namespace fastseq
