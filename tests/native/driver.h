// What the cases share: numbers to compute on, a hash of what came out, a line for each case.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "simd/half.h"

namespace iirsnn::native {

void lif_cases();
void batch_norm_cases();
void event_cases();
void spike_cases();

// The same numbers on every machine: integers, scaled by exact operations.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double real(double low, double high) { return low + (high - low) * double(next() >> 11) * 0x1p-53; }
  int64_t integer(int64_t low, int64_t high) { return low + int64_t(next() % uint64_t(high - low + 1)); }
  template <typename scalar_t>
  std::vector<scalar_t> reals(int64_t count, double low, double high) {
    using acc_t = typename Convert<scalar_t>::acc_t;
    std::vector<scalar_t> values(count);
    for (scalar_t& value : values) value = Convert<scalar_t>::round(acc_t(real(low, high)));
    return values;
  }

 private:
  uint64_t state_;
};

// A NaN is hashed as one NaN: which bits an operation gives it is the processor's choice.
inline uint64_t bits_of(float x) { return x == x ? bit_cast<uint32_t>(x) : 0x7fc00000u; }
inline uint64_t bits_of(double x) { return x == x ? bit_cast<uint64_t>(x) : uint64_t(0x7ff8) << 48; }
inline uint64_t bits_of(Half x) { return (x.bits & 0x7fffu) > 0x7c00u ? 0x7e00u : x.bits; }
inline uint64_t bits_of(BFloat16 x) { return (x.bits & 0x7fffu) > 0x7f80u ? 0x7fc0u : x.bits; }
inline uint64_t bits_of(uint64_t x) { return x; }
inline uint64_t bits_of(int64_t x) { return uint64_t(x); }
inline uint64_t bits_of(uint8_t x) { return x; }
inline uint64_t bits_of(bool x) { return x; }

class Hash {
 public:
  template <typename value_t>
  Hash& add(const value_t& value) {
    state_ = (state_ ^ bits_of(value)) * 0x9e3779b97f4a7c15u;
    state_ ^= state_ >> 29;
    return *this;
  }
  template <typename value_t>
  Hash& add(const std::vector<value_t>& values) {
    for (const value_t& value : values) add(value);
    return add(uint64_t(values.size()));
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0;
};

void print(const std::string& name, const Hash& hash);

int threads();  // of the environment variable THREADS

// f(first, last) for parts of [0, units), each by a thread of its own.
template <typename F>
void in_parts(int64_t units, const F& f) {
  const int64_t part = std::max<int64_t>((units + threads() - 1) / threads(), 1);
  std::vector<std::thread> team;
  for (int64_t first = part; first < units; first += part) {
    team.emplace_back([&f, first, last = std::min(first + part, units)] { f(first, last); });
  }
  f(0, std::min(part, units));
  for (std::thread& thread : team) thread.join();
}

}  // namespace iirsnn::native
