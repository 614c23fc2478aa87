// Rows of float16 to floats and back: by the processor's own conversions where it has them, which compilers do not make
// of the loops.
#include "lif/cpu/rows.h"

#if defined(IIRSNN_AVX2)
#include <immintrin.h>
#endif

namespace iirsnn {
namespace {

struct LoadRow {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Half* from, float* to, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) to[i] = to_acc(from[i]);
  }
};

struct StoreRow {
  template <int kBytes>
  static IIRSNN_INLINE void run(const float* from, Half* to, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) to[i] = Convert<Half>::round(from[i]);
  }
};

#if defined(IIRSNN_AVX2)
IIRSNN_AVX2 void load_f16c(const Half* from, float* to, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  LoadRow::run<16>(from + i, to + i, n - i);
}
IIRSNN_AVX2 void store_f16c(const float* from, Half* to, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  StoreRow::run<16>(from + i, to + i, n - i);
}
#endif

}  // namespace

void copy_row(const Half* from, float* to, int n) {
#if defined(IIRSNN_AVX2)
  if (capability() >= kAvx2) return load_f16c(from, to, n);
#endif
  run<LoadRow>(from, to, n);
}
void copy_row(const float* from, Half* to, int n) {
#if defined(IIRSNN_AVX2)
  if (capability() >= kAvx2) return store_f16c(from, to, n);
#endif
  run<StoreRow>(from, to, n);
}

}  // namespace iirsnn
