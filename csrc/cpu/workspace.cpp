#include "workspace.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace fastseq {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
// What a thread may keep between calls; a larger block is given back at the end of its call.
constexpr std::size_t kKeep = std::size_t{64} << 20;

struct Block {
  char* mapping = nullptr;
  std::size_t mapped = 0;

  ~Block() { release(); }
  char* data() const {
    const auto address = reinterpret_cast<std::uintptr_t>(mapping);
    return mapping + ((address + kHugePage - 1) / kHugePage * kHugePage - address);
  }
  std::size_t size() const { return mapping == nullptr ? 0 : mapped - kHugePage; }
  void reserve(std::size_t bytes) {
    if (bytes <= size()) return;
    release();
    const std::size_t wanted = (bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
    void* found = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    mapping = static_cast<char*>(found);
    mapped = wanted;
#if defined(MADV_HUGEPAGE)
    madvise(data(), size(), MADV_HUGEPAGE);  // a hint: its refusal changes nothing but speed
#endif
  }
  void release() {
    if (mapping != nullptr) munmap(mapping, mapped);
    mapping = nullptr;
    mapped = 0;
  }
};

thread_local Block block;

}  // namespace

Workspace::Workspace(std::size_t bytes) {
  block.reserve(bytes);
  data_ = block.data();
}

Workspace::~Workspace() {
  if (block.size() > kKeep) block.release();
}

}  // namespace fastseq
