#include "lif/cpu/lif_cpu.h"
#include "lif/cpu/packed.h"
#include "lif/cpu/rows.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bits are written as little-endian words");

namespace iirsnn {
namespace {

// Whole vectors of floats: the sign bit of 4 s says whether s is 1.
template <typename scalar_t>
struct PackRow {
  template <int kBytes>
  static IIRSNN_INLINE void run(const scalar_t* s, int n, uint8_t* bits, bool* nan) {
    using V = Lanes<float, kBytes>;
    using Words = Register<int32_t, kBytes>;
    constexpr int kEach = kBytes / 4;
    Words unordered = {};
    for (int i = 0; i < n; i += V::kSize) {
      const V spikes = load<V>(s + i);
      uint32_t word = 0;
      IIRSNN_REGISTERS
      for (int k = 0; k < V::kRegisters; ++k) {
        unordered |= (Words)(spikes.r[k] != spikes.r[k]);
        word |= uint32_t(sign_bits<kBytes>((Words)spikes.r[k] << 2)) << (k * kEach);
      }
      memcpy(bits + i / 8, &word, sizeof(word));
    }
    *nan = sign_bits<kBytes>(unordered) != 0;
  }
};

template <typename out_t>
struct UnpackRow {  // n neurons, from the first bit of `bits` on
  using acc_t = typename Convert<out_t>::acc_t;
  template <int kBytes>
  static IIRSNN_INLINE void run(const uint8_t* bits, out_t* s, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) s[i] = Convert<out_t>::spike((bits[i >> 3] >> (i & 7)) & 1 ? acc_t(1) : acc_t(0));
  }
};

}  // namespace

template <typename scalar_t>
bool pack_row(const scalar_t* s, int n, uint8_t* bits) {
  bool nan = false;
  run<PackRow<scalar_t>>(s, n, bits, &nan);
  return nan;
}
template bool pack_row(const float*, int, uint8_t*);
template bool pack_row(const BFloat16*, int, uint8_t*);

template <>
bool pack_row(const double* s, int n, uint8_t* bits) {
  bool nan = false;
  for (int i = 0; i < n; i += 8) {
    uint32_t byte = 0;
    for (int j = 0; j < 8; ++j) {
      byte |= uint32_t(s[i + j] > 0) << j;
      nan |= s[i + j] != s[i + j];
    }
    bits[i / 8] = uint8_t(byte);
  }
  return nan;
}

void unpack_spikes_cpu(const uint8_t* bits, void* s, DType dtype, int64_t neurons, int64_t first, int64_t last) {
  with_scalar(dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto unpack = version<UnpackRow<scalar_t>>();
    for (int64_t t = first; t < last; ++t) {
      const uint8_t* from = bits + t * packed_bytes(neurons);
      scalar_t* to = static_cast<scalar_t*>(s) + t * neurons;
      for (int64_t begin = 0; begin < neurons; begin += kBlock) {
        unpack(from + begin / 8, to + begin, int(std::min<int64_t>(kBlock, neurons - begin)));
      }
    }
  });
}

}  // namespace iirsnn
