// Whole blocks, and memory for them: what LIF, event and spike loops share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace iirsnn {

constexpr int kWord = 64;           // channels in a word of bits
constexpr int64_t kCacheLine = 64;  // bytes; registers of every instruction set are aligned to it

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Numbers, aligned to a cache line; of none, null. Uninitialised, but for zeros().
template <typename item_t>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : size_(count) {
    if (count == 0) return;
    data_ = static_cast<item_t*>(std::aligned_alloc(kCacheLine, round_up(bytes(), kCacheLine)));
    if (!data_) throw std::bad_alloc();
  }
  // On huge pages where there is enough of it: rows are read at random, and pages that malloc has used before would
  // stay small.
  static Buffer zeros(int64_t count) {
#if defined(__linux__)
    if (count * int64_t(sizeof(item_t)) >= kHugePage / 2) return on_huge_pages(count);
#endif
    Buffer made(count);
    if (count != 0) std::memset(made.data_, 0, made.bytes());
    return made;
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(map_, other.map_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~Buffer() {
#if defined(__linux__)
    if (map_) {
      munmap(map_, mapped_);
      return;
    }
#endif
    std::free(data_);
  }

  // Gives `count` numbers back to the system where it can, from a multiple of a huge page on: they are zeros again.
  void forget(int64_t from, int64_t count) {
#if defined(__linux__)
    if (map_) madvise(data_ + from, count * sizeof(item_t), MADV_DONTNEED);
#endif
  }

  item_t* get() const { return data_; }
  item_t& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t bytes() const { return size_ * int64_t(sizeof(item_t)); }

#if defined(__linux__)
  static constexpr int64_t kHugePage = 2 << 20;
  static Buffer on_huge_pages(int64_t count) {
    Buffer made;
    made.size_ = count;
    made.mapped_ = round_up(made.bytes(), kHugePage) + kHugePage;  // so that an aligned part is large enough
    void* all = mmap(nullptr, made.mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    made.map_ = all;
    made.data_ = reinterpret_cast<item_t*>(round_up(reinterpret_cast<int64_t>(all), kHugePage));
    int64_t huge = round_up(made.bytes(), kHugePage);
    if (huge > made.bytes() + made.bytes() / 4) huge -= kHugePage;  // the last one would stand mostly empty
    madvise(made.data_, huge, MADV_HUGEPAGE);                       // a wish; refusing it does no harm
    return made;
  }
#endif

  item_t* data_ = nullptr;
  int64_t size_ = 0;
  void* map_ = nullptr;  // where huge pages were asked for: all of the mapping
  int64_t mapped_ = 0;
};

}  // namespace iirsnn
