// Whole blocks, and memory for them: what event and spike loops share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace iirsnn {

constexpr int kWord = 64;           // channels in a word of bits
constexpr int64_t kCacheLine = 64;  // bytes; registers of every instruction set are aligned to it

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Uninitialised numbers, aligned to a cache line; of none, null.
template <typename item_t>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(count == 0 ? nullptr
                         : static_cast<item_t*>(
                               std::aligned_alloc(kCacheLine, round_up(count * int64_t(sizeof(item_t)), kCacheLine)))) {
    if (!data_ && count != 0) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  item_t* get() const { return data_; }
  item_t& operator[](int64_t i) const { return data_[i]; }

 private:
  item_t* data_;
};

}  // namespace iirsnn
