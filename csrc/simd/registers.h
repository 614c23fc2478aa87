// A register of an instruction set, kBytes wide: 16 (SSE2, NEON), 32 (AVX2) or 64 (AVX-512). Vectors that are wider
// than the machine's GCC lowers through memory, so every loop is written over a register of the machine's own.
#pragma once

#include <type_traits>
#include <utility>

#include "simd/half.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass between inlined functions only
#endif

// For loops over registers: unrolled early, so that an array of many registers stays in registers; and for
// those that must not be unrolled.
#if defined(__clang__)
#define IIRSNN_REGISTERS _Pragma("unroll")
#define IIRSNN_ROLLED _Pragma("nounroll")
#else
#define IIRSNN_REGISTERS _Pragma("GCC unroll 16")
#define IIRSNN_ROLLED _Pragma("GCC unroll 1")
#endif

// A lambda that is inlined into the loop that it is written in, so that it has its instruction set.
#define IIRSNN_INLINE_LAMBDA __attribute__((always_inline))

namespace iirsnn {

// Registers that the instruction set has.
#if defined(__aarch64__)
template <int kBytes>
constexpr int kRegisterCount = 32;
#else
template <int kBytes>
constexpr int kRegisterCount = kBytes == 64 ? 32 : 16;
#endif

template <typename number_t, int kBytes>
struct RegisterOf {
  typedef number_t Type __attribute__((vector_size(kBytes)));
};
template <typename number_t, int kBytes>
using Register = typename RegisterOf<number_t, kBytes>::Type;

template <typename register_t>
IIRSNN_INLINE register_t load_register(const void* from) {  // aligned to its size
  register_t r;
  memcpy(&r, __builtin_assume_aligned(from, sizeof(r)), sizeof(r));
  return r;
}
template <typename register_t>
IIRSNN_INLINE register_t load_loose(const void* from) {
  register_t r;
  memcpy(&r, from, sizeof(r));
  return r;
}
template <typename register_t>
IIRSNN_INLINE void store_loose(void* to, const register_t& r) {
  memcpy(to, &r, sizeof(r));
}
template <typename register_t>
IIRSNN_INLINE void store_register(void* to, const register_t& r) {
  memcpy(__builtin_assume_aligned(to, sizeof(r)), &r, sizeof(r));
}
// A number in all lanes; as an integer: GCC fills a float in lane by lane, inlined into a wider instruction set.
template <int kBytes, typename number_t>
IIRSNN_INLINE Register<number_t, kBytes> spread(number_t number) {
  using wide_t = std::conditional_t<sizeof(number_t) == 4, uint32_t, uint64_t>;
  using bits_t = std::conditional_t<sizeof(number_t) == 2, uint16_t, wide_t>;
  return (Register<number_t, kBytes>)(bit_cast<bits_t>(number) - Register<bits_t, kBytes>{});
}

template <int kFirst, typename part_t, typename register_t, int... i>
IIRSNN_INLINE part_t part_of(const register_t& r, std::integer_sequence<int, i...>) {
  return (part_t)__builtin_shufflevector(r, r, (kFirst + i)...);
}

// Bit i of the result is the sign of lane i.
template <int kBytes>
IIRSNN_INLINE uint64_t sign_bits(const Register<int32_t, kBytes>& lanes) {
#if defined(__aarch64__)
  constexpr Register<int32_t, kBytes> kBits = {1, 2, 4, 8};
  return uint32_t(vaddvq_s32((int32x4_t)((lanes >> 31) & kBits)));
#elif defined(__x86_64__) && defined(__clang__)  // it knows wider registers in functions of wider targets only
  if constexpr (kBytes == 16) {
    return uint32_t(__builtin_ia32_movmskps((Register<float, 16>)lanes));
  } else {
    using Half = Register<int32_t, kBytes / 2>;
    constexpr auto kHalf = std::make_integer_sequence<int, kBytes / 8>();
    return sign_bits<kBytes / 2>(part_of<0, Half>(lanes, kHalf)) |
           sign_bits<kBytes / 2>(part_of<kBytes / 8, Half>(lanes, kHalf)) << (kBytes / 8);
  }
#elif defined(__x86_64__)
  if constexpr (kBytes == 32) {
    uint32_t bits;
    asm("vmovmskps %1, %0" : "=r"(bits) : "x"(lanes));
    return bits;
  } else if constexpr (kBytes == 16) {
    uint32_t bits;
    asm("movmskps %1, %0" : "=r"(bits) : "x"(lanes));
    return bits;
  } else {
    uint64_t halves[2];
    store_loose(halves, __builtin_convertvector(lanes >> 31, Register<int8_t, kBytes / 4>));
    uint64_t bits = 0;
    for (int i = 0; i < 2; ++i) {  // byte k keeps its bit k; the product adds all bytes up in the highest one
      bits |= (((halves[i] & 0x8040201008040201u) * 0x0101010101010101u) >> 56) << (8 * i);
    }
    return bits;
  }
#else
  uint64_t bits = 0;
  for (int i = 0; i < kBytes / 4; ++i) bits |= uint64_t(lanes[i] < 0) << i;
  return bits;
#endif
}

// Past the caches, to an address that registers may be aligned to: where nobody will read it before it has left them.
template <typename register_t>
IIRSNN_INLINE void stream(void* to, const register_t& r) {
#if defined(__clang__)
  __builtin_nontemporal_store(r, static_cast<register_t*>(to));
#elif defined(__x86_64__)
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

// Whole numbers as ones of twice the size. Eight bytes GCC converts lane by lane: shuffled, they take two instructions.
template <typename wide_t, typename numbers_t, int... i>
IIRSNN_INLINE wide_t doubled(const numbers_t& numbers, std::integer_sequence<int, i...>) {
  return (wide_t)__builtin_shufflevector(numbers, numbers, (i / 2)...) >> 4 * int(sizeof(wide_t) / (sizeof...(i) / 2));
}
template <typename wide_t, typename numbers_t>
IIRSNN_INLINE wide_t widened(const numbers_t& numbers) {
  if constexpr (sizeof(wide_t) > 16) {
    return __builtin_convertvector(numbers, wide_t);
  } else {
    return doubled<wide_t>(numbers, std::make_integer_sequence<int, sizeof(wide_t) / sizeof(numbers[0])>());
  }
}

// To lane i is added lane i + half, then lane i + half / 2, ...
template <int half, typename register_t, int... i>
IIRSNN_INLINE void fold(register_t& r, std::integer_sequence<int, i...> lanes) {
  r = r + __builtin_shufflevector(r, r, ((i + half) % int(sizeof...(i)))...);
  if constexpr (half > 1) fold<half / 2>(r, lanes);
}

// ---- Floats and bfloat16, loaded and stored as a register of floats ----

template <int kBytes>
constexpr int kFloats = kBytes / 4;  // of a register

template <int kBytes>
IIRSNN_INLINE Register<float, kBytes> load_part(const float* from) {
  return load_loose<Register<float, kBytes>>(from);
}
template <int kBytes>
IIRSNN_INLINE Register<float, kBytes> load_part(const BFloat16* from) {
  const auto halves = load_loose<Register<uint16_t, kBytes / 2>>(from);
  return (Register<float, kBytes>)(widened<Register<uint32_t, kBytes>>(halves) << 16);
}
template <int kBytes, typename scalar_t>
IIRSNN_INLINE Register<float, kBytes> load_some(const scalar_t* from, int count) {  // zeros beyond `count`
  alignas(64) float values[kFloats<kBytes>] = {};
  for (int i = 0; i < count; ++i) values[i] = to_acc(from[i]);
  return load_register<Register<float, kBytes>>(values);
}
template <int kBytes, typename scalar_t>
IIRSNN_INLINE Register<float, kBytes> load_up_to(const scalar_t* from, int64_t count) {
  return count >= kFloats<kBytes> ? load_part<kBytes>(from) : load_some<kBytes>(from, int(count));
}

template <int kBytes>
IIRSNN_INLINE void store_part(const Register<float, kBytes>& v, float* to) {
  store_loose(to, v);
}
template <int kBytes>
IIRSNN_INLINE void store_part(const Register<float, kBytes>& v, BFloat16* to) {
  using Words = Register<uint32_t, kBytes>;
  const Words bits = (Words)v;
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = (v == v) ? rounded : Words{} + 0x7fc0u;
  store_loose(to, __builtin_convertvector(rounded, Register<uint16_t, kBytes / 2>));
}
template <int kBytes, typename scalar_t>
IIRSNN_INLINE void store_up_to(const Register<float, kBytes>& v, scalar_t* to, int64_t count) {
  if (count >= kFloats<kBytes>) return store_part<kBytes>(v, to);
  alignas(64) float values[kFloats<kBytes>];
  store_register(values, v);
  for (int i = 0; i < count; ++i) to[i] = Convert<scalar_t>::round(values[i]);
}

// rows[i][j] <-> rows[j][i]: in every round, the upper and the lower half are interleaved.
template <typename register_t, int... i>
IIRSNN_INLINE void interleave(const register_t& a, const register_t& b, register_t& low, register_t& high,
                              std::integer_sequence<int, i...>) {
  constexpr int kCount = sizeof...(i);
  low = __builtin_shufflevector(a, b, (i / 2 + i % 2 * kCount)...);
  high = __builtin_shufflevector(a, b, (kCount / 2 + i / 2 + i % 2 * kCount)...);
}
template <int kBytes>
IIRSNN_INLINE void transpose(Register<float, kBytes>* rows) {
  constexpr int kCount = kFloats<kBytes>;
  IIRSNN_REGISTERS
  for (int round = 1; round < kCount; round *= 2) {
    Register<float, kBytes> next[kCount];
    IIRSNN_REGISTERS
    for (int i = 0; i < kCount / 2; ++i) {
      interleave(rows[i], rows[i + kCount / 2], next[2 * i], next[2 * i + 1],
                 std::make_integer_sequence<int, kCount>());
    }
    IIRSNN_REGISTERS
    for (int i = 0; i < kCount; ++i) rows[i] = next[i];
  }
}

}  // namespace iirsnn
