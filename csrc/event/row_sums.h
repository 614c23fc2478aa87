// Sums of kWidth outputs in registers, to which rows of weights are added: fp32, bf16 and int8.
#pragma once

#include <cstdint>

#include "event/kernels.h"
#include "simd/versions.h"

namespace iirsnn::event {

struct Fp32 {
  using weight_t = float;
  using sum_t = float;
  using Wide = Fp32;  // what rows become once where many visits read them
  static constexpr int kUnit = row_unit(Precision::fp32);

  template <int kWidth, int kBytes>
  struct Sum {
    using Floats = Register<float, kBytes>;
    static constexpr int kLanes = kBytes / 4, kRegisters = kWidth / kLanes;
    Floats v[kRegisters];

    IIRSNN_INLINE void load(const float* sums) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) v[i] = load_register<Floats>(sums + i * kLanes);
    }
    // += row * 2^digit, by doubling
    IIRSNN_INLINE void add(const float* row, int digit) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) add(i, load_register<Floats>(row + i * kLanes), digit);
    }
    IIRSNN_INLINE void add(int i, Floats part, int digit) {
      for (; digit > 0; --digit) part += part;
      v[i] += part;
    }
    IIRSNN_INLINE void store(float* sums) const {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) store_register(sums + i * kLanes, v[i]);
    }
  };
};

// Two outputs, 16 apart, share 32 bits: the low half is the first one's.
struct Bf16 {
  using weight_t = uint16_t;
  using sum_t = float;
  using Wide = Fp32;
  static constexpr int kUnit = row_unit(Precision::bf16);

  template <int kWidth, int kBytes>
  struct Sum : Fp32::Sum<kWidth, kBytes> {
    using Base = Fp32::Sum<kWidth, kBytes>;
    using typename Base::Floats;
    using Words = Register<uint32_t, kBytes>;
    static constexpr int kOf16 = 64 / kBytes;  // registers of 16 outputs

    IIRSNN_INLINE void add(const uint16_t* row, int digit) {
      each(row, [&](int i, const Floats& part) IIRSNN_INLINE_LAMBDA { Base::add(i, part, digit); });
    }
    static IIRSNN_INLINE void widen(const uint16_t* row, float* wide) {
      each(row, [&](int i, const Floats& part) IIRSNN_INLINE_LAMBDA { store_register(wide + i * Base::kLanes, part); });
    }

   private:
    template <typename F>
    static IIRSNN_INLINE void each(const uint16_t* row, F f) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kWidth / 32; ++i) {
        IIRSNN_REGISTERS
        for (int j = 0; j < kOf16; ++j) {
          const Words pairs = load_register<Words>(row + i * 32 + j * (kBytes / 2));
          f(2 * i * kOf16 + j, (Floats)(pairs << 16));  // the same bits
          f((2 * i + 1) * kOf16 + j, (Floats)(pairs & 0xffff0000u));
        }
      }
    }
  };
};

// 16-bit sums: Carry says where they have to be carried over to 32 bits, from bounds that the engine proves.
template <typename stored_t>  // int8_t or int16_t
struct Integer {
  using weight_t = stored_t;
  using sum_t = int16_t;
  using Wide = Integer<int16_t>;
  static constexpr int kUnit = row_unit(Precision::int8);

  template <int kWidth, int kBytes>
  struct Sum {
    using Shorts = Register<int16_t, kBytes>;
    using Bytes = Register<int8_t, kBytes / 2>;
    static constexpr int kLanes = kBytes / 2, kRegisters = kWidth / kLanes;
    Shorts v[kRegisters];

    IIRSNN_INLINE void load(const int16_t* sums) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) v[i] = load_register<Shorts>(sums + i * kLanes);
    }
    IIRSNN_INLINE void add(const int8_t* row, int digit) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) {
        v[i] += widened<Shorts>(load_register<Bytes>(row + i * kLanes)) << digit;
      }
    }
    IIRSNN_INLINE void add(const int16_t* row, int digit) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) v[i] += load_register<Shorts>(row + i * kLanes) << digit;
    }
    static IIRSNN_INLINE void widen(const int8_t* row, int16_t* wide) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) {
        store_register(wide + i * kLanes, widened<Shorts>(load_register<Bytes>(row + i * kLanes)));
      }
    }
    IIRSNN_INLINE void store(int16_t* sums) const {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) store_register(sums + i * kLanes, v[i]);
    }
  };
};

// totals += sums * 2^digit; sums = 0
template <int kBytes>
IIRSNN_INLINE void carry_over(const Additions& work, int digit) {
  using Half = Register<int16_t, kBytes / 2>;
  using Ints = Register<int32_t, kBytes>;
  constexpr int kLanes = kBytes / 4;
  int16_t* sums = static_cast<int16_t*>(work.sums);
  int32_t* totals = work.totals;
  const int64_t count = work.positions * work.width;  // a multiple of 32
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    IIRSNN_REGISTERS
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * kLanes;
      const Ints part = widened<Ints>(load_register<Half>(sums + at));
      store_register(totals + at, load_register<Ints>(totals + at) + (part << digit));
    }
    store_register(sums + i, Register<int16_t, kBytes>{});
  }
}

}  // namespace iirsnn::event
