// Sums -> spikes, or logits.
#include <cstdint>

#include "event/kernels.h"
#include "lif/lif_step.h"
#include "simd/versions.h"

namespace iirsnn::event {
namespace {

template <bool kInteger, int kBytes>
IIRSNN_INLINE Register<float, kBytes> current(const Neurons& work, const char* sums, int output, const uint64_t* skip) {
  using Floats = Register<float, kBytes>;
  using Ints = Register<int32_t, kBytes>;
  Floats h;
  if constexpr (kInteger) {
    h = __builtin_convertvector(load_register<Ints>(sums), Floats);
    h = h * load_loose<Floats>(work.scale + output) + load_loose<Floats>(work.bias + output);
  } else {
    h = load_register<Floats>(sums);
  }
  if (skip) {
    constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Ints lane = load_loose<Ints>(kLanes);
    Ints count{};
    for (int digit = 0; digit < work.skip_planes; ++digit) {
      const int32_t bits = int32_t(skip[digit * work.skip_plane] >> (output % kWord) & 0xffff);
      count += (((bits - Ints{}) >> lane) & 1) << digit;
    }
    h += __builtin_convertvector(count, Floats) * spread<kBytes>(work.skip_unit);
  }
  return h;
}

IIRSNN_INLINE int64_t added(const Neurons& work, const uint64_t* skip) {
  int64_t bits = 0;
  for (int digit = 0; skip && digit < work.skip_planes; ++digit) {
    bits += __builtin_popcountll(skip[digit * work.skip_plane]);
  }
  return bits;
}

template <bool kInteger, bool kSkip>
struct FireOnce {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Neurons* work_, Fired* fired) {
    const Neurons work = *work_;
    int64_t count = 0, skips = 0;
    const char* sums = static_cast<const char*>(work.sums);
    for (int64_t image = 0; image < work.images; ++image) {
      for (int64_t p = 0; p < work.positions; ++p, sums += work.width * 4) {
        const int64_t at = image * work.image_words + p * work.words;
        for (int word = 0; word * kWord < work.outputs; ++word) {
          const uint64_t* skip = kSkip ? work.skip + at + word : nullptr;
          skips += added(work, skip);
          const int outputs = work.outputs - word * kWord < kWord ? work.outputs - word * kWord : kWord;
          uint64_t bits = 0;
          using Floats = Register<float, kBytes>;
          const auto some = [&](int i) IIRSNN_INLINE_LAMBDA {
            const int output = word * kWord + i;
            const Floats h = current<kInteger, kBytes>(work, sums + output * 4, output, skip);
            bits |= sign_bits<kBytes>(h > load_loose<Floats>(work.threshold + output)) << i;
          };
          if (outputs == kWord) {
            IIRSNN_REGISTERS
            for (int i = 0; i < kWord; i += kBytes / 4) some(i);
          } else {
            for (int i = 0; i < outputs; i += kBytes / 4) some(i);
          }
          if (outputs < kWord) bits &= (uint64_t(1) << outputs) - 1;
          work.spikes[at + word] = bits;
          count += __builtin_popcountll(bits);
        }
      }
    }
    fired->spikes += count;
    fired->skips += skips;
  }
};

template <bool kInteger, Reset kReset>
struct FireOverTime {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Neurons* work_, Fired* fired) {
    const Neurons work = *work_;
    int64_t count = 0, skips = 0;
    const int64_t step = work.positions * work.width * 4;
    for (int64_t image = 0; image < work.images; ++image) {
      const char* first = static_cast<const char*>(work.sums) + image * (work.constant ? 1 : work.timesteps) * step;
      for (int64_t p = 0; p < work.positions; ++p) {
        for (int output = 0; output < work.outputs; output += 16) {
          const int lanes = work.outputs - output < 16 ? work.outputs - output : 16, shift = output % kWord;
          alignas(64) float v[16] = {};
          for (int64_t t = 0; t < work.timesteps; ++t) {
            const int64_t at = (image * work.timesteps + t) * work.image_words + p * work.words + output / kWord;
            const char* sums = first + (work.constant ? 0 : t) * step + (p * work.width + output) * 4;
            alignas(64) float h[16];
            const uint64_t* skip = work.skip ? work.skip + at : nullptr;
            IIRSNN_REGISTERS
            for (int i = 0; i < 16; i += kBytes / 4) {
              store_register(h + i, current<kInteger, kBytes>(work, sums + i * 4, output + i, skip));
            }
            if (shift == 0) skips += added(work, skip);
            uint64_t bits = 0;
            for (int i = 0; i < lanes; ++i) {
              const Neuron<float> neuron{work.threshold[output + i], 0.0f, work.leak[output + i], work.v_reset};
              if (t > 0) h[i] = charge<kReset>(h[i], v[i], neuron);
              v[i] = discharge<kReset>(h[i], neuron);
              bits |= uint64_t(h[i] > neuron.threshold) << i;
            }
            work.spikes[at] = (shift ? work.spikes[at] : 0) | bits << shift;
            count += __builtin_popcountll(bits);
          }
        }
      }
    }
    fired->spikes += count;
    fired->skips += skips;
  }
};

template <bool kInteger>
void fire_as(const Neurons& work, Fired& fired) {
  if (work.timesteps == 1) {
    return work.skip ? run<FireOnce<kInteger, true>>(&work, &fired) : run<FireOnce<kInteger, false>>(&work, &fired);
  }
  switch (work.reset) {
    case Reset::soft:
      return run<FireOverTime<kInteger, Reset::soft>>(&work, &fired);
    case Reset::hard:
      return run<FireOverTime<kInteger, Reset::hard>>(&work, &fired);
    case Reset::none:
      return run<FireOverTime<kInteger, Reset::none>>(&work, &fired);
    case Reset::soft_delayed:
      return run<FireOverTime<kInteger, Reset::soft_delayed>>(&work, &fired);
  }
}

}  // namespace

Fired fire(const Neurons& work) {
  Fired fired;
  if (work.integer) {
    fire_as<true>(work, fired);
  } else {
    fire_as<false>(work, fired);
  }
  return fired;
}

void read_out(const Logits& work) {
  for (int64_t image = 0; image < work.images; ++image) {
    for (int output = 0; output < work.outputs; ++output) {
      float total = 0.0f;
      for (int64_t t = 0; t < work.timesteps; ++t) {
        const int64_t row = work.constant ? image : image * work.timesteps + t;
        const int64_t at = row * work.width + output;
        total += work.integer
                     ? float(static_cast<const int32_t*>(work.sums)[at]) * work.scale[output] + work.bias[output]
                     : static_cast<const float*>(work.sums)[at];
      }
      work.logits[image * work.stride + output] = total;
    }
  }
}

}  // namespace iirsnn::event
