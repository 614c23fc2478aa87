// Spikes and average-pooled spikes to bits and counts, with the proof that they are such, and back.
#include "simd/versions.h"
#include "spike/spike.h"

namespace iirsnn::sparse {
namespace {

// 64 values, or the first `count` of them, to a word; `odd` collects lanes that are neither 0 nor the spike's value.
template <int kBytes, typename scalar_t>
IIRSNN_INLINE uint64_t word_of(const scalar_t* from, int64_t count, const Register<float, kBytes>& value,
                               Register<int32_t, kBytes>& odd) {
  uint64_t word = 0;
  const auto some = [&](const Register<float, kBytes>& v, int i) IIRSNN_INLINE_LAMBDA {
    const Register<int32_t, kBytes> set = v != 0.0f;
    odd |= set & (v != value);
    word |= sign_bits<kBytes>(set) << i;
  };
  if (count >= kWord) {
    IIRSNN_REGISTERS
    for (int i = 0; i < kWord; i += kFloats<kBytes>) some(load_part<kBytes>(from + i), i);
  } else {
    for (int i = 0; i < count; i += kFloats<kBytes>) some(load_up_to<kBytes>(from + i, count - i), i);
  }
  return word;
}

IIRSNN_INLINE void transpose64(uint64_t* words) {  // bit j of word i <-> bit i of word j
  uint64_t mask = 0x00000000ffffffffu;
  for (int width = 32; width > 0; width >>= 1, mask ^= mask << width) {
    for (int i = 0; i < 64; i = ((i | width) + 1) & ~width) {
      const uint64_t swap = ((words[i] >> width) ^ words[i | width]) & mask;
      words[i] ^= swap << width;
      words[i | width] ^= swap;
    }
  }
}

template <typename scalar_t>
struct PackBits {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Pack* work_, int64_t first, int64_t last, int64_t* nonzeros, bool* exact) {
    const Pack work = *work_;
    const int64_t words = ceil_div(work.channels, kWord);
    const scalar_t* x = static_cast<const scalar_t*>(work.x) + first * work.channels * work.positions;
    uint64_t* to = static_cast<uint64_t*>(work.packed) + first * work.positions * words;
    const Register<float, kBytes> value = spread<kBytes>(work.table[1]);
    Register<int32_t, kBytes> odd{};
    int64_t count = 0;
    for (int64_t image = first; image < last; ++image) {
      if (work.channels_last) {
        for (int64_t p = 0; p < work.positions; ++p, x += work.channels) {
          for (int64_t c = 0; c < work.channels; c += kWord) {
            *to = word_of<kBytes>(x + c, work.channels - c, value, odd);
            count += __builtin_popcountll(*to++);
          }
        }
      } else {
        for (int64_t c = 0; c < work.channels; c += kWord) {
          for (int64_t p = 0; p < work.positions; p += kWord) {
            uint64_t block[kWord] = {};
            for (int64_t i = 0; i < kWord && c + i < work.channels; ++i) {
              block[i] = word_of<kBytes>(x + (c + i) * work.positions + p, work.positions - p, value, odd);
              count += __builtin_popcountll(block[i]);
            }
            transpose64(block);
            for (int64_t i = 0; i < kWord && p + i < work.positions; ++i) to[(p + i) * words + c / kWord] = block[i];
          }
        }
        x += work.channels * work.positions;
        to += work.positions * words;
      }
      if (sign_bits<kBytes>(odd)) break;
    }
    *nonzeros += count;
    *exact = !sign_bits<kBytes>(odd);
  }
};

template <typename scalar_t>
struct PackCounts {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Pack* work_, int64_t first, int64_t last, int64_t* nonzeros, bool* exact) {
    const Pack work = *work_;
    const int64_t size = work.channels * work.positions;
    const int64_t step_c = work.channels_last ? 1 : work.positions, step_p = work.channels_last ? work.channels : 1;
    const float scale = work.inverse_unit;
    for (int64_t image = first; image < last; ++image) {
      const scalar_t* from = static_cast<const scalar_t*>(work.x) + image * size;
      uint8_t* to = static_cast<uint8_t*>(work.packed) + image * size;
      int64_t count = 0;
      int32_t odd = 0;
      for (int64_t p = 0; p < work.positions; ++p) {
        for (int64_t c = 0; c < work.channels; ++c) {
          const float value = to_acc(from[p * step_p + c * step_c]);
          float code = value * scale + 0.5f;
          code = code > 0.0f ? code : 0.0f;  // NaN too
          code = code < float(kTable - 1) ? code : float(kTable - 1);
          const int32_t n = int32_t(code);
          odd |= work.table[n] != value;
          count += n != 0;
          to[p * work.channels + c] = uint8_t(n);
        }
      }
      *nonzeros += count;
      *exact = !odd;
      if (odd) return;
    }
  }
};

template <typename scalar_t>
struct UnpackLoop {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Unpack* work_, int64_t first, int64_t last) {
    const Unpack work = *work_;
    scalar_t* to = static_cast<scalar_t*>(work.x) + first * work.positions * work.channels;
    if (work.source.kind == Kind::counts) {
      const uint8_t* from = static_cast<const uint8_t*>(work.source.data) + first * work.positions * work.channels;
      for (int64_t i = (last - first) * work.positions * work.channels; i > 0; --i) {
        *to++ = Convert<scalar_t>::round(work.source.table[*from++]);
      }
      return;
    }
    const int64_t words = ceil_div(work.channels, kWord);
    const uint64_t* from = static_cast<const uint64_t*>(work.source.data) + first * work.positions * words;
    using Ints = Register<int32_t, kBytes>;
    using Floats = Register<float, kBytes>;
    constexpr int32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Ints lane = load_loose<Ints>(kLane);
    const Floats value = spread<kBytes>(work.source.table[1]);
    for (int64_t p = (last - first) * work.positions; p > 0; --p, from += words, to += work.channels) {
      for (int64_t c = 0; c < work.channels; c += kFloats<kBytes>) {
        const int32_t bits = int32_t(from[c / kWord] >> (c % kWord) & 0xffff);
        const Ints set = -(((bits - Ints{}) >> lane) & 1);
        store_up_to<kBytes>((Floats)((Ints)value & set), to + c, work.channels - c);
      }
    }
  }
};

}  // namespace

bool pack_bits(const Pack& work, int64_t first, int64_t last, int64_t& nonzeros) {
  bool exact = true;
  if (work.dtype == DType::bfloat16) {
    run<PackBits<BFloat16>>(&work, first, last, &nonzeros, &exact);
  } else {
    run<PackBits<float>>(&work, first, last, &nonzeros, &exact);
  }
  return exact;
}

bool pack_counts(const Pack& work, int64_t first, int64_t last, int64_t& nonzeros) {
  bool exact = true;
  if (work.dtype == DType::bfloat16) {
    run<PackCounts<BFloat16>>(&work, first, last, &nonzeros, &exact);
  } else {
    run<PackCounts<float>>(&work, first, last, &nonzeros, &exact);
  }
  return exact;
}

void unpack(const Unpack& work, int64_t first, int64_t last) {
  if (work.dtype == DType::bfloat16) {
    run<UnpackLoop<BFloat16>>(&work, first, last);
  } else {
    run<UnpackLoop<float>>(&work, first, last);
  }
}

}  // namespace iirsnn::sparse
