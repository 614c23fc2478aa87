// Memory for weights and sums: aligned, zeroed, on huge pages where there is enough of it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "event/shape.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace iirsnn::event {

// Zeros, aligned to a cache line, or on huge pages where there is enough of it: rows are read at random, and pages that
// malloc has used before would stay small.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
#if defined(__linux__)
    constexpr int64_t kHugePage = 2 << 20;
    if (bytes >= kHugePage / 2) {
      mapped_ = round_up(bytes, kHugePage) + kHugePage;  // so that an aligned part is large enough
      void* all = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (all == MAP_FAILED) throw std::bad_alloc();
      map_ = static_cast<char*>(all);
      data_ = map_ + (round_up(reinterpret_cast<int64_t>(map_), kHugePage) - reinterpret_cast<int64_t>(map_));
      int64_t huge = round_up(bytes, kHugePage);
      if (huge > bytes + bytes / 4) huge -= kHugePage;  // the last one would stand mostly empty
      madvise(data_, huge, MADV_HUGEPAGE);              // a wish; refusing it does no harm
      return;
    }
#endif
    data_ = static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
  }
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(map_, other.map_);
    std::swap(mapped_, other.mapped_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Memory() {
#if defined(__linux__)
    if (map_) {
      munmap(map_, mapped_);
      return;
    }
#endif
    std::free(data_);
  }

  // Gives `bytes` back to the system where it can, from a multiple of a huge page on: they are zeros again.
  void forget(int64_t from, int64_t bytes) {
#if defined(__linux__)
    if (map_) madvise(data_ + from, bytes, MADV_DONTNEED);
#endif
  }

  char* data() const { return data_; }
  int64_t size() const { return bytes_; }

 private:
  char *data_ = nullptr, *map_ = nullptr;
  int64_t mapped_ = 0, bytes_ = 0;
};

}  // namespace iirsnn::event
