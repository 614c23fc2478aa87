// The step that all products of events are made of: for each event of a list, add a row of 16 or 32 floats to sums in
// registers.
#pragma once

#include "simd/registers.h"

namespace iirsnn::sparse {

template <int kWidth, int kBytes>
struct Row {
  using Floats = Register<float, kBytes>;
  static constexpr int kRegisters = kWidth / kFloats<kBytes>;
  Floats v[kRegisters];

  IIRSNN_INLINE void zero() {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) v[i] = Floats{};
  }
  IIRSNN_INLINE void load(const float* from) {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) v[i] = load_register<Floats>(from + i * kFloats<kBytes>);
  }
  IIRSNN_INLINE void store(float* to) const {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) store_register(to + i * kFloats<kBytes>, v[i]);
  }
  IIRSNN_INLINE void add(const Row& other) {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) v[i] += other.v[i];
  }
  template <bool kValues>
  IIRSNN_INLINE void add(uintptr_t row, float value) {
    const Floats factor = kValues ? spread<kBytes>(value) : Floats{};
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) {
      const Floats part = load_register<Floats>(reinterpret_cast<const char*>(row + i * kBytes));
      v[i] += kValues ? part * factor : part;
    }
  }
};

// sums[tap] += the rows at `rows - tap * row` of the events [first, last), a float each where kValues. `rows` is an
// address, not a pointer: it may lie outside the array, where the events' rows do not.
// Two sums take turns where there are few: an addition takes several cycles, and one can start in each.
template <int kPart, int kWidth, int kTaps, bool kValues, int kBytes>
IIRSNN_INLINE void accumulate_part(uintptr_t rows, const uint32_t* entries, const float* values, int64_t first,
                                   int64_t last, float* sums) {
  constexpr bool kTwo = kTaps * kWidth < 64;
  Row<kPart, kBytes> sum[kTaps], other[kTaps];
  IIRSNN_REGISTERS
  for (int tap = 0; tap < kTaps; ++tap) {
    sum[tap].load(sums + tap * kWidth);
    if (kTwo) other[tap].zero();
  }
  int64_t e = first;
  if (kTwo) {
    for (; e + 2 <= last; e += 2) {
      IIRSNN_REGISTERS
      for (int tap = 0; tap < kTaps; ++tap) {
        sum[tap].template add<kValues>(rows + entries[e] - tap * kWidth * 4, kValues ? values[e] : 0.0f);
        other[tap].template add<kValues>(rows + entries[e + 1] - tap * kWidth * 4, kValues ? values[e + 1] : 0.0f);
      }
    }
  }
  for (; e < last; ++e) {
    IIRSNN_REGISTERS
    for (int tap = 0; tap < kTaps; ++tap) {
      sum[tap].template add<kValues>(rows + entries[e] - tap * kWidth * 4, kValues ? values[e] : 0.0f);
    }
  }
  IIRSNN_REGISTERS
  for (int tap = 0; tap < kTaps; ++tap) {
    if (kTwo) sum[tap].add(other[tap]);
    sum[tap].store(sums + tap * kWidth);
  }
}

template <int kWidth, int kTaps, bool kValues, int kBytes>
IIRSNN_INLINE void accumulate(uintptr_t rows, const uint32_t* entries, const float* values, int64_t first, int64_t last,
                              float* sums) {
#if defined(__x86_64__)
  constexpr int kPart = kBytes == 16 ? 16 : kWidth;  // sums in 16 registers
#else
  constexpr int kPart = kWidth;
#endif
  for (int part = 0; part < kWidth; part += kPart) {
    accumulate_part<kPart, kWidth, kTaps, kValues, kBytes>(rows + part * 4, entries, values, first, last, sums + part);
  }
}

}  // namespace iirsnn::sparse
