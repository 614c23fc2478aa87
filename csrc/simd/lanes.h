// 128 bytes of numbers at once: 32 floats or 16 doubles, held in registers of kBytes. The instruction set decides
// kBytes alone, never how many numbers go together: sums come in one order everywhere. The arithmetic of lif_step.h
// takes a Lanes where it takes a number; kTotal is less than 128 where it takes a part of them.
#pragma once

#include "simd/registers.h"

namespace iirsnn {

constexpr int kVectorBytes = 128;

// A statement for each register k, a constant, of up to 8: without a loop compilers see numbers and not memory from the
// start: bfloat16 in backward, two registers a part, compiles in a third of the time.
#define IIRSNN_AT_REGISTER(index, count, ...) \
  if constexpr (index < count) {              \
    constexpr int k = index;                  \
    __VA_ARGS__;                              \
  }
#define IIRSNN_EACH_REGISTER(count, ...)       \
  {                                            \
    IIRSNN_AT_REGISTER(0, count, __VA_ARGS__); \
    IIRSNN_AT_REGISTER(1, count, __VA_ARGS__); \
    IIRSNN_AT_REGISTER(2, count, __VA_ARGS__); \
    IIRSNN_AT_REGISTER(3, count, __VA_ARGS__); \
    IIRSNN_AT_REGISTER(4, count, __VA_ARGS__); \
    IIRSNN_AT_REGISTER(5, count, __VA_ARGS__); \
    IIRSNN_AT_REGISTER(6, count, __VA_ARGS__); \
    IIRSNN_AT_REGISTER(7, count, __VA_ARGS__); \
  }

// What a comparison of two Lanes gives: all bits of a lane, or none.
template <typename number_t, int kBytes, int kTotal>
struct Mask {
  using Register = iirsnn::Register<number_t, kBytes>;
  decltype(Register() > Register()) r[kTotal / kBytes];
};

template <typename number_t, int kBytes, int kTotal = kVectorBytes>
struct Lanes {
  using Register = iirsnn::Register<number_t, kBytes>;
  static constexpr int kRegisters = kTotal / kBytes, kSize = kTotal / sizeof(number_t);
  Register r[kRegisters];

  Lanes() = default;
  // Register by register: GCC moves a whole, even of one, through memory in halves.
  IIRSNN_INLINE Lanes(const Lanes& other) { *this = other; }
  IIRSNN_INLINE Lanes& operator=(const Lanes& other) {
    IIRSNN_EACH_REGISTER(kRegisters, r[k] = other.r[k])
    return *this;
  }
  IIRSNN_INLINE Lanes(number_t number) { IIRSNN_EACH_REGISTER(kRegisters, r[k] = spread<kBytes>(number)) }
};

#define IIRSNN_LANES_OPERATOR(op)                                                                       \
  template <typename number_t, int kBytes, int kTotal>                                                  \
  IIRSNN_INLINE Lanes<number_t, kBytes, kTotal> operator op(const Lanes<number_t, kBytes, kTotal>& a,   \
                                                            const Lanes<number_t, kBytes, kTotal>& b) { \
    Lanes<number_t, kBytes, kTotal> result;                                                             \
    IIRSNN_EACH_REGISTER(kTotal / kBytes, result.r[k] = a.r[k] op b.r[k])                               \
    return result;                                                                                      \
  }
IIRSNN_LANES_OPERATOR(+)
IIRSNN_LANES_OPERATOR(-)
IIRSNN_LANES_OPERATOR(*)
IIRSNN_LANES_OPERATOR(/)
IIRSNN_LANES_OPERATOR(&)
IIRSNN_LANES_OPERATOR(|)
#undef IIRSNN_LANES_OPERATOR

#define IIRSNN_LANES_COMPARISON(op)                                                                    \
  template <typename number_t, int kBytes, int kTotal>                                                 \
  IIRSNN_INLINE Mask<number_t, kBytes, kTotal> operator op(const Lanes<number_t, kBytes, kTotal>& a,   \
                                                           const Lanes<number_t, kBytes, kTotal>& b) { \
    Mask<number_t, kBytes, kTotal> result;                                                             \
    IIRSNN_EACH_REGISTER(kTotal / kBytes, result.r[k] = a.r[k] op b.r[k])                              \
    return result;                                                                                     \
  }
IIRSNN_LANES_COMPARISON(>)
IIRSNN_LANES_COMPARISON(<)
IIRSNN_LANES_COMPARISON(<=)
IIRSNN_LANES_COMPARISON(==)
#undef IIRSNN_LANES_COMPARISON

template <typename number_t, int kBytes, int kTotal>
IIRSNN_INLINE Lanes<number_t, kBytes, kTotal> operator-(const Lanes<number_t, kBytes, kTotal>& a) {
  Lanes<number_t, kBytes, kTotal> result;
  IIRSNN_EACH_REGISTER(kTotal / kBytes, result.r[k] = -a.r[k])
  return result;
}

template <typename number_t, int kBytes, int kTotal>
IIRSNN_INLINE Lanes<number_t, kBytes, kTotal> operator<<(const Lanes<number_t, kBytes, kTotal>& a, int bits) {
  Lanes<number_t, kBytes, kTotal> result;
  IIRSNN_EACH_REGISTER(kTotal / kBytes, result.r[k] = a.r[k] << bits)
  return result;
}

template <typename number_t, int kBytes, int kTotal>
IIRSNN_INLINE Lanes<number_t, kBytes, kTotal> operator>>(const Lanes<number_t, kBytes, kTotal>& a, int bits) {
  Lanes<number_t, kBytes, kTotal> result;
  IIRSNN_EACH_REGISTER(kTotal / kBytes, result.r[k] = a.r[k] >> bits)
  return result;
}

// The mask may come from numbers of another type of the same size.
template <typename mask_t, typename number_t, int kBytes, int kTotal>
IIRSNN_INLINE Lanes<number_t, kBytes, kTotal> select(const Mask<mask_t, kBytes, kTotal>& mask,
                                                     const Lanes<number_t, kBytes, kTotal>& a,
                                                     const Lanes<number_t, kBytes, kTotal>& b) {
  Lanes<number_t, kBytes, kTotal> result;
  IIRSNN_EACH_REGISTER(kTotal / kBytes, result.r[k] = mask.r[k] ? a.r[k] : b.r[k])
  return result;
}

template <typename number_t, int kBytes, int kTotal>
struct Number<Lanes<number_t, kBytes, kTotal>> {
  using type = number_t;
  using bits_t = Lanes<typename Number<number_t>::bits_t, kBytes, kTotal>;
};

// Register by register: GCC moves a whole of several through memory.
template <typename to_t, typename number_t, int kBytes, int kTotal>
IIRSNN_INLINE to_t bit_cast(const Lanes<number_t, kBytes, kTotal>& a) {
  to_t result;
  IIRSNN_EACH_REGISTER(to_t::kRegisters, result.r[k] = (typename to_t::Register)(a.r[k]))
  return result;
}

template <int kBytes, int kTotal>
IIRSNN_INLINE Lanes<float, kBytes, kTotal> magnitude(const Lanes<float, kBytes, kTotal>& z) {
  using Bits = Lanes<uint32_t, kBytes, kTotal>;
  return bit_cast<Lanes<float, kBytes, kTotal>>(bit_cast<Bits>(z) & Bits(0x7fffffffu));
}
template <int kBytes, int kTotal>
IIRSNN_INLINE Lanes<double, kBytes, kTotal> magnitude(const Lanes<double, kBytes, kTotal>& z) {
  using Bits = Lanes<uint64_t, kBytes, kTotal>;
  return bit_cast<Lanes<double, kBytes, kTotal>>(bit_cast<Bits>(z) & Bits(~uint64_t(0) >> 1));
}

// A vector's first lanes, or all but them; zeros in place of the others.
template <typename V>
struct LaneMasks {
  using bits_t = typename Number<typename Number<V>::type>::bits_t;
  using Bits = typename Number<V>::bits_t;
  bits_t bits[3 * V::kSize];
  constexpr LaneMasks() : bits() {
    for (int i = 0; i < 3 * V::kSize; ++i) bits[i] = i / V::kSize == 1 ? bits_t(0) : ~bits_t(0);
  }
  static IIRSNN_INLINE V kept(const V& value, int from) {
    alignas(64) static constexpr LaneMasks kMasks{};
    Bits mask;
    constexpr int kLanes = V::kSize / V::kRegisters;
    IIRSNN_EACH_REGISTER(V::kRegisters, memcpy(&mask.r[k], kMasks.bits + from + k * kLanes, sizeof(mask.r[k])))
    return bit_cast<V>(bit_cast<Bits>(value) & mask);
  }
};
template <typename V>
IIRSNN_INLINE V first_lanes(const V& value, int count) {
  return LaneMasks<V>::kept(value, V::kSize - count);
}
template <typename V>
IIRSNN_INLINE V other_lanes(const V& value, int count) {
  return LaneMasks<V>::kept(value, 2 * V::kSize - count);
}

// The sum of the lanes, halving them: one order, on every instruction set.
template <typename number_t, int kBytes, int kTotal>
IIRSNN_INLINE number_t sum(Lanes<number_t, kBytes, kTotal> a) {
  constexpr int kLanes = kBytes / sizeof(number_t);
  for (int half = a.kRegisters / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) a.r[k] = a.r[k] + a.r[k + half];
  }
  fold<kLanes / 2>(a.r[0], std::make_integer_sequence<int, kLanes>());
  return a.r[0][0];
}

// ---- Memory: load<V>(p) and store(p, v) for V Lanes ----

template <typename V>
struct Memory;
template <typename number_t, int kBytes, int kTotal>
struct Memory<Lanes<number_t, kBytes, kTotal>> {
  using V = Lanes<number_t, kBytes, kTotal>;
  using Bits = Lanes<uint32_t, kBytes, kTotal>;
  using Halves = Register<uint16_t, kBytes>;
  static constexpr int kLanes = kBytes / sizeof(number_t);  // of a register

  static IIRSNN_INLINE V load(const number_t* from) {
    V value;
    IIRSNN_EACH_REGISTER(V::kRegisters, memcpy(&value.r[k], from + k * kLanes, kBytes))
    return value;
  }
  static IIRSNN_INLINE void store(number_t* to, const V& value, bool past_caches = false) {
    if (__builtin_expect(past_caches, false)) {
      IIRSNN_EACH_REGISTER(V::kRegisters, stream(to + k * kLanes, value.r[k]))
    } else {
      IIRSNN_EACH_REGISTER(V::kRegisters, memcpy(to + k * kLanes, &value.r[k], kBytes))
    }
  }
  static IIRSNN_INLINE void store_spike(number_t* to, const V& s, bool past_caches = false) {
    store(to, s, past_caches);
  }

  // A register of halves is two of floats.
  static IIRSNN_INLINE V load(const BFloat16* from) {
    Bits bits;
    IIRSNN_EACH_REGISTER(V::kRegisters / 2, {
      Halves halves;
      memcpy(&halves, from + 2 * k * kLanes, kBytes);
      widen(halves, bits.r[2 * k], bits.r[2 * k + 1], std::make_integer_sequence<int, 2 * kLanes>());
    })
    return bit_cast<V>(bits);
  }
  static IIRSNN_INLINE void store_high(BFloat16* to, const Bits& bits, bool past_caches) {
    Halves halves[V::kRegisters / 2];
    constexpr auto kBoth = std::make_integer_sequence<int, 2 * kLanes>();
    IIRSNN_EACH_REGISTER(V::kRegisters / 2, narrow(bits.r[2 * k], bits.r[2 * k + 1], halves[k], kBoth))
    if (__builtin_expect(past_caches, false)) {
      IIRSNN_EACH_REGISTER(V::kRegisters / 2, stream(to + 2 * k * kLanes, halves[k]))
    } else {
      IIRSNN_EACH_REGISTER(V::kRegisters / 2, memcpy(to + 2 * k * kLanes, &halves[k], kBytes))
    }
  }
  static IIRSNN_INLINE void store(BFloat16* to, const V& value,
                                  bool past_caches = false) {  // as Convert<BFloat16>::round
    const Bits bits = bit_cast<Bits>(value);
    const Bits rounded = bits + Bits(0x7fffu) + ((bits >> 16) & Bits(1u));
    store_high(to, select(value == value, rounded, Bits(0x7fc00000u)), past_caches);
  }
  static IIRSNN_INLINE void store_spike(BFloat16* to, const V& s, bool past_caches = false) {
    store_high(to, bit_cast<Bits>(s), past_caches);
  }
};

template <typename V, typename scalar_t>
IIRSNN_INLINE V load(const scalar_t* from) {
  return Memory<V>::load(from);
}
template <typename V, typename scalar_t>
IIRSNN_INLINE void store(scalar_t* to, const V& value, bool past_caches = false) {
  Memory<V>::store(to, value, past_caches);
}

}  // namespace iirsnn
