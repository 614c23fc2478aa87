// 64 bytes of numbers at once: 16 floats or 8 doubles, held in registers of kBytes. The instruction set decides kBytes
// alone, never how many numbers go together: sums come in one order everywhere. The arithmetic of lif_step.h takes a
// Lanes where it takes a number.
#pragma once

#include "half.h"

namespace iirsnn {

// What a comparison of two Lanes gives: all bits of a lane, or none.
template <typename number_t, int kBytes>
struct Mask {
  typedef number_t Register __attribute__((vector_size(kBytes)));
  decltype(Register() > Register()) r[64 / kBytes];
};

template <typename number_t, int kBytes>
struct Lanes {
  typedef number_t Register __attribute__((vector_size(kBytes)));
  static constexpr int kRegisters = 64 / kBytes, kSize = 64 / sizeof(number_t);
  Register r[kRegisters];

  Lanes() = default;
  IIRSNN_INLINE Lanes(number_t number) {
    for (int k = 0; k < kRegisters; ++k) r[k] = number - Register();
  }
};

#define IIRSNN_LANES_OPERATOR(op)                                                                 \
  template <typename number_t, int kBytes>                                                        \
  IIRSNN_INLINE Lanes<number_t, kBytes> operator op(const Lanes<number_t, kBytes>& a,             \
                                                    const Lanes<number_t, kBytes>& b) {           \
    Lanes<number_t, kBytes> result;                                                               \
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
  for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = -a.r[k];
  return result;
}

template <typename number_t, int kBytes>
IIRSNN_INLINE Lanes<number_t, kBytes> operator<<(const Lanes<number_t, kBytes>& a, int bits) {
  Lanes<number_t, kBytes> result;
  for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = a.r[k] << bits;
  return result;
}

template <typename number_t, int kBytes>
IIRSNN_INLINE Lanes<number_t, kBytes> operator>>(const Lanes<number_t, kBytes>& a, int bits) {
  Lanes<number_t, kBytes> result;
  for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = a.r[k] >> bits;
  return result;
}

// The mask may come from numbers of another type of the same size.
template <typename mask_t, typename number_t, int kBytes>
IIRSNN_INLINE Lanes<number_t, kBytes> select(const Mask<mask_t, kBytes>& mask, const Lanes<number_t, kBytes>& a,
                                             const Lanes<number_t, kBytes>& b) {
  Lanes<number_t, kBytes> result;
  for (int k = 0; k < Lanes<number_t, kBytes>::kRegisters; ++k) result.r[k] = mask.r[k] ? a.r[k] : b.r[k];
  return result;
}

template <typename number_t, int kBytes>
struct Number<Lanes<number_t, kBytes>> {
  using type = number_t;
  using bits_t = Lanes<typename Number<number_t>::bits_t, kBytes>;
};

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

// The sum of the lanes, halving them: one order, on every instruction set.
template <typename number_t, int kBytes>
IIRSNN_INLINE number_t sum(const Lanes<number_t, kBytes>& a) {
  number_t lane[Lanes<number_t, kBytes>::kSize];
  memcpy(lane, &a, sizeof(a));
  for (int half = Lanes<number_t, kBytes>::kSize / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  }
  return lane[0];
}

IIRSNN_INLINE float sum(float a) { return a; }
IIRSNN_INLINE double sum(double a) { return a; }

// ---- Memory: load<V>(p) and store(p, v) for V a number or its Lanes ----

template <typename V>
struct Memory {  // V is float or double
  template <typename scalar_t>
  static IIRSNN_INLINE V load(const scalar_t* from) {
    return to_acc(*from);
  }
  template <typename scalar_t>
  static IIRSNN_INLINE void store(scalar_t* to, V value) {
    *to = Convert<scalar_t>::round(value);
  }
  template <typename scalar_t>
  static IIRSNN_INLINE void store_spike(scalar_t* to, V s) {
    *to = Convert<scalar_t>::spike(s);
  }
};

template <typename number_t, int kBytes>
struct Memory<Lanes<number_t, kBytes>> {
  using V = Lanes<number_t, kBytes>;
  using Bits = Lanes<uint32_t, kBytes>;
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

  static IIRSNN_INLINE V load(const number_t* from) {
    V value;
    memcpy(&value, from, sizeof(value));
    return value;
  }
  static IIRSNN_INLINE void store(number_t* to, const V& value) { memcpy(to, &value, sizeof(value)); }
  static IIRSNN_INLINE void store_spike(number_t* to, const V& s) { store(to, s); }

  static IIRSNN_INLINE V load(const BFloat16* from) {
    Bits bits;
    for (int k = 0; k < V::kRegisters; ++k) {
      Halves halves;
      memcpy(&halves, from + k * (kBytes / 4), sizeof(halves));
      bits.r[k] = __builtin_convertvector(halves, typename Bits::Register) << 16;
    }
    return bit_cast<V>(bits);
  }
  static IIRSNN_INLINE void store_high(BFloat16* to, const Bits& bits) {
    for (int k = 0; k < V::kRegisters; ++k) {
      const Halves halves = __builtin_convertvector(bits.r[k] >> 16, Halves);
      memcpy(to + k * (kBytes / 4), &halves, sizeof(halves));
    }
  }
  static IIRSNN_INLINE void store(BFloat16* to, const V& value) {  // as Convert<BFloat16>::round
    const Bits bits = bit_cast<Bits>(value);
    const Bits rounded = bits + Bits(0x7fffu) + ((bits >> 16) & Bits(1u));
    store_high(to, select(value == value, rounded, Bits(0x7fc00000u)));
  }
  static IIRSNN_INLINE void store_spike(BFloat16* to, const V& s) { store_high(to, bit_cast<Bits>(s)); }
};

template <typename V, typename scalar_t>
IIRSNN_INLINE V load(const scalar_t* from) {
  return Memory<V>::load(from);
}
template <typename V, typename scalar_t>
IIRSNN_INLINE void store(scalar_t* to, const V& value) {
  Memory<V>::store(to, value);
}

}  // namespace iirsnn
