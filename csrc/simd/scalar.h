// The arithmetic of one number, rounded operation by operation: the same bits on host and device. lanes.h has that of
// many.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define IIRSNN_INLINE __host__ __device__ __forceinline__
#else
#define IIRSNN_INLINE inline __attribute__((always_inline))
#endif

namespace iirsnn {

// Rounded one by one, so that no compiler contracts a product and a sum into an FMA. The host needs -ffp-contract=off.
#if defined(__CUDA_ARCH__)
IIRSNN_INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
IIRSNN_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
IIRSNN_INLINE float sub(float a, float b) { return __fsub_rn(a, b); }
IIRSNN_INLINE float div(float a, float b) { return __fdiv_rn(a, b); }
IIRSNN_INLINE double mul(double a, double b) { return __dmul_rn(a, b); }
IIRSNN_INLINE double add(double a, double b) { return __dadd_rn(a, b); }
IIRSNN_INLINE double sub(double a, double b) { return __dsub_rn(a, b); }
IIRSNN_INLINE double div(double a, double b) { return __ddiv_rn(a, b); }
#else
template <typename acc_t>
IIRSNN_INLINE acc_t mul(acc_t a, acc_t b) {
  return a * b;
}
template <typename acc_t>
IIRSNN_INLINE acc_t add(acc_t a, acc_t b) {
  return a + b;
}
template <typename acc_t>
IIRSNN_INLINE acc_t sub(acc_t a, acc_t b) {
  return a - b;
}
template <typename acc_t>
IIRSNN_INLINE acc_t div(acc_t a, acc_t b) {
  return a / b;
}
#endif

template <typename to_t, typename from_t>
IIRSNN_INLINE to_t bit_cast(from_t value) {
  static_assert(sizeof(to_t) == sizeof(from_t), "bit_cast keeps the size");
  to_t result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

template <typename acc_t>
IIRSNN_INLINE acc_t select(bool condition, acc_t a, acc_t b) {
  return condition ? a : b;
}

template <typename acc_t>
IIRSNN_INLINE acc_t magnitude(acc_t z) {
  return z < acc_t(0) ? -z : z;
}

// 0 for what is below, NaN for NaN.
template <typename acc_t>
IIRSNN_INLINE acc_t positive(acc_t a) {
  return select(a < acc_t(0), acc_t(0), a);
}

// The same in one instruction or none.
#if defined(__CUDA_ARCH__)
IIRSNN_INLINE float magnitude(float z) { return fabsf(z); }
#if __CUDA_ARCH__ >= 800
IIRSNN_INLINE float positive(float a) {
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(a));
  return a;
}
#endif
#endif

// What arithmetic is about: a number, or on the CPU many at once (lanes.h).
template <typename acc_t>
struct Number;
template <>
struct Number<float> {
  using type = float;
  using bits_t = uint32_t;
};
template <>
struct Number<double> {
  using type = double;
  using bits_t = uint64_t;
};

}  // namespace iirsnn
