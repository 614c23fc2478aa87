// 128 bytes of numbers at once: 32 floats or 16 doubles, held in registers of kBytes. The instruction set decides
// kBytes alone, never how many numbers go together: sums come in one order everywhere. At least two registers, because
// the second one's arithmetic fills the time the first one's waits. The arithmetic of lif_step.h takes a Lanes where it
// takes a number.
#pragma once

#include <type_traits>
#include <utility>

#include "simd/half.h"

namespace iirsnn {

constexpr int kVectorBytes = 128;

// For loops over registers: unrolled early, so that GCC keeps a Lanes of many registers in registers.
#if defined(__clang__)
#define IIRSNN_REGISTERS _Pragma("unroll")
#else
#define IIRSNN_REGISTERS _Pragma("GCC unroll 8")
#endif

// What a comparison of two Lanes gives: all bits of a lane, or none.
template <typename number_t, int kBytes>
struct Mask {
  typedef number_t Register __attribute__((vector_size(kBytes)));
  decltype(Register() > Register()) r[kVectorBytes / kBytes];
};

template <typename number_t, int kBytes>
struct Lanes {
  typedef number_t Register __attribute__((vector_size(kBytes)));
  static constexpr int kRegisters = kVectorBytes / kBytes, kSize = kVectorBytes / sizeof(number_t);
  Register r[kRegisters];

  Lanes() = default;
  // Spread as an integer: a float GCC fills in lane by lane, inlined into functions for a wider instruction set.
  IIRSNN_INLINE Lanes(number_t number) {
    using bits_t = std::conditional_t<sizeof(number_t) == 4, uint32_t, uint64_t>;
    typedef bits_t Bits __attribute__((vector_size(kBytes)));
    IIRSNN_REGISTERS
    for (int k = 0; k < kRegisters; ++k) r[k] = (Register)(bit_cast<bits_t>(number) - Bits());
  }
};

#define IIRSNN_LANES_OPERATOR(op)                                                                 \
  template <typename number_t, int kBytes>                                                        \
  IIRSNN_INLINE Lanes<number_t, kBytes> operator op(const Lanes<number_t, kBytes>& a,             \
                                                    const Lanes<number_t, kBytes>& b) {           \
    Lanes<number_t, kBytes> result;                                                               \
    IIRSNN_REGISTERS                                                                              \
    for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = a.r[k] op b.r[k]; \
    return result;                                                                                \
  }
IIRSNN_LANES_OPERATOR(+)
IIRSNN_LANES_OPERATOR(-)
IIRSNN_LANES_OPERATOR(*)
IIRSNN_LANES_OPERATOR(/)
IIRSNN_LANES_OPERATOR(&)
IIRSNN_LANES_OPERATOR(|)
#undef IIRSNN_LANES_OPERATOR

#define IIRSNN_LANES_COMPARISON(op)                                                               \
  template <typename number_t, int kBytes>                                                        \
  IIRSNN_INLINE Mask<number_t, kBytes> operator op(const Lanes<number_t, kBytes>& a,              \
                                                   const Lanes<number_t, kBytes>& b) {            \
    Mask<number_t, kBytes> result;                                                                \
    IIRSNN_REGISTERS                                                                              \
    for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = a.r[k] op b.r[k]; \
    return result;                                                                                \
  }
IIRSNN_LANES_COMPARISON(>)
IIRSNN_LANES_COMPARISON(<)
IIRSNN_LANES_COMPARISON(<=)
IIRSNN_LANES_COMPARISON(==)
#undef IIRSNN_LANES_COMPARISON

template <typename number_t, int kBytes>
IIRSNN_INLINE Lanes<number_t, kBytes> operator-(const Lanes<number_t, kBytes>& a) {
  Lanes<number_t, kBytes> result;
  IIRSNN_REGISTERS
  for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = -a.r[k];
  return result;
}

template <typename number_t, int kBytes>
IIRSNN_INLINE Lanes<number_t, kBytes> operator<<(const Lanes<number_t, kBytes>& a, int bits) {
  Lanes<number_t, kBytes> result;
  IIRSNN_REGISTERS
  for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = a.r[k] << bits;
  return result;
}

template <typename number_t, int kBytes>
IIRSNN_INLINE Lanes<number_t, kBytes> operator>>(const Lanes<number_t, kBytes>& a, int bits) {
  Lanes<number_t, kBytes> result;
  IIRSNN_REGISTERS
  for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = a.r[k] >> bits;
  return result;
}

// The mask may come from numbers of another type of the same size.
template <typename mask_t, typename number_t, int kBytes>
IIRSNN_INLINE Lanes<number_t, kBytes> select(const Mask<mask_t, kBytes>& mask, const Lanes<number_t, kBytes>& a,
                                             const Lanes<number_t, kBytes>& b) {
  Lanes<number_t, kBytes> result;
  IIRSNN_REGISTERS
  for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = mask.r[k] ? a.r[k] : b.r[k];
  return result;
}

template <typename number_t, int kBytes>
struct Number<Lanes<number_t, kBytes>> {
  using type = number_t;
  using bits_t = Lanes<typename Number<number_t>::bits_t, kBytes>;
};

// Register by register: GCC moves a whole of several through memory.
template <typename to_t, typename number_t, int kBytes>
IIRSNN_INLINE to_t bit_cast(const Lanes<number_t, kBytes>& a) {
  to_t result;
  IIRSNN_REGISTERS
  for (int k = 0; k < to_t::kRegisters; ++k) result.r[k] = (typename to_t::Register)(a.r[k]);
  return result;
}

template <int kBytes>
IIRSNN_INLINE Lanes<float, kBytes> magnitude(const Lanes<float, kBytes>& z) {
  using Bits = Lanes<uint32_t, kBytes>;
  return bit_cast<Lanes<float, kBytes>>(bit_cast<Bits>(z) & Bits(0x7fffffffu));
}
template <int kBytes>
IIRSNN_INLINE Lanes<double, kBytes> magnitude(const Lanes<double, kBytes>& z) {
  using Bits = Lanes<uint64_t, kBytes>;
  return bit_cast<Lanes<double, kBytes>>(bit_cast<Bits>(z) & Bits(~uint64_t(0) >> 1));
}

// To lane i is added lane i + half, then lane i + half / 2, ...
template <int half, typename register_t, int... i>
IIRSNN_INLINE void fold(register_t& r, std::integer_sequence<int, i...> lanes) {
  r = r + __builtin_shufflevector(r, r, ((i + half) % int(sizeof...(i)))...);
  if constexpr (half > 1) fold<half / 2>(r, lanes);
}

// The sum of the lanes, halving them: one order, on every instruction set.
template <typename number_t, int kBytes>
IIRSNN_INLINE number_t sum(Lanes<number_t, kBytes> a) {
  constexpr int kLanes = kBytes / sizeof(number_t);
  for (int half = a.kRegisters / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) a.r[k] = a.r[k] + a.r[k + half];
  }
  fold<kLanes / 2>(a.r[0], std::make_integer_sequence<int, kLanes>());
  return a.r[0][0];
}

IIRSNN_INLINE float sum(float a) { return a; }
IIRSNN_INLINE double sum(double a) { return a; }

// Past the caches, to an address that registers may be aligned to: where nobody will read it before it has left them.
template <typename register_t>
IIRSNN_INLINE void stream(void* to, const register_t& r) {
#if defined(__x86_64__)
  if constexpr (sizeof(r) == 16) {
    asm("movntps %1, %0" : "=m"(*static_cast<register_t*>(to)) : "x"(r));
  } else {
    asm("vmovntps %1, %0" : "=m"(*static_cast<register_t*>(to)) : "v"(r));
  }
#else
  memcpy(to, &r, sizeof(r));
#endif
}

// The lower and the upper halves, each above 16 bits of zero.
template <typename halves_t, typename word_t, int... i>
IIRSNN_INLINE void widen(const halves_t& halves, word_t& low, word_t& high, std::integer_sequence<int, i...>) {
  const halves_t zero = {};
  low = (word_t)__builtin_shufflevector(zero, halves, (i % 2 * int(sizeof...(i)) + i / 2)...);
  high = (word_t)__builtin_shufflevector(zero, halves, (i % 2 * int(sizeof...(i)) + int(sizeof...(i)) / 2 + i / 2)...);
}
// The upper 16 bits of words.
template <typename halves_t, typename word_t, int... i>
IIRSNN_INLINE void narrow(const word_t& low, const word_t& high, halves_t& halves, std::integer_sequence<int, i...>) {
  halves = __builtin_shufflevector((halves_t)low, (halves_t)high, (2 * i + 1)...);
}

// ---- Memory: load<V>(p) and store(p, v) for V a number or its Lanes ----

template <typename V>
struct Memory {  // V is float or double
  template <typename scalar_t>
  static IIRSNN_INLINE V load(const scalar_t* from) {
    return to_acc(*from);
  }
  template <typename scalar_t>
  static IIRSNN_INLINE void store(scalar_t* to, V value, bool = false) {
    *to = Convert<scalar_t>::round(value);
  }
  template <typename scalar_t>
  static IIRSNN_INLINE void copy_past_caches(scalar_t* to, const scalar_t* from) {
    *to = *from;
  }
  template <typename scalar_t>
  static IIRSNN_INLINE void store_spike(scalar_t* to, V s, bool = false) {
    *to = Convert<scalar_t>::spike(s);
  }
};

template <typename number_t, int kBytes>
struct Memory<Lanes<number_t, kBytes>> {
  using V = Lanes<number_t, kBytes>;
  using Bits = Lanes<uint32_t, kBytes>;
  typedef uint16_t Halves __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / sizeof(number_t);  // of a register
  static_assert(V::kRegisters % 2 == 0, "halves are widened to two registers at once");

  // As many scalars as there are lanes.
  template <typename scalar_t>
  static IIRSNN_INLINE void copy_past_caches(scalar_t* to, const scalar_t* from) {
    IIRSNN_REGISTERS
    for (int i = 0; i < V::kSize * int(sizeof(scalar_t)); i += kBytes) {
      typename Bits::Register r;
      memcpy(&r, reinterpret_cast<const char*>(from) + i, kBytes);
      stream(reinterpret_cast<char*>(to) + i, r);
    }
  }

  static IIRSNN_INLINE V load(const number_t* from) {
    V value;
    IIRSNN_REGISTERS
    for (int k = 0; k < V::kRegisters; ++k) memcpy(&value.r[k], from + k * kLanes, kBytes);
    return value;
  }
  static IIRSNN_INLINE void store(number_t* to, const V& value, bool past_caches = false) {
    if (__builtin_expect(past_caches, false)) {
      IIRSNN_REGISTERS
      for (int k = 0; k < V::kRegisters; ++k) stream(to + k * kLanes, value.r[k]);
    } else {
      IIRSNN_REGISTERS
      for (int k = 0; k < V::kRegisters; ++k) memcpy(to + k * kLanes, &value.r[k], kBytes);
    }
  }
  static IIRSNN_INLINE void store_spike(number_t* to, const V& s, bool past_caches = false) {
    store(to, s, past_caches);
  }

  // A register of halves is two of floats.
  static IIRSNN_INLINE V load(const BFloat16* from) {
    Bits bits;
    IIRSNN_REGISTERS
    for (int k = 0; k < V::kRegisters; k += 2) {
      Halves halves;
      memcpy(&halves, from + k * kLanes, kBytes);
      widen(halves, bits.r[k], bits.r[k + 1], std::make_integer_sequence<int, 2 * kLanes>());
    }
    return bit_cast<V>(bits);
  }
  static IIRSNN_INLINE void store_high(BFloat16* to, const Bits& bits, bool past_caches) {
    Halves halves[V::kRegisters / 2];
    IIRSNN_REGISTERS
    for (int k = 0; k < V::kRegisters; k += 2) {
      narrow(bits.r[k], bits.r[k + 1], halves[k / 2], std::make_integer_sequence<int, 2 * kLanes>());
    }
    if (__builtin_expect(past_caches, false)) {
      IIRSNN_REGISTERS
      for (int k = 0; k < V::kRegisters; k += 2) stream(to + k * kLanes, halves[k / 2]);
    } else {
      IIRSNN_REGISTERS
      for (int k = 0; k < V::kRegisters; k += 2) memcpy(to + k * kLanes, &halves[k / 2], kBytes);
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
