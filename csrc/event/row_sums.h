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
    IIRSNN_INLINE void end(int) {}
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

// 16-bit sums: Carry says where they have to be carried over to 32 bits, from bounds that the engine proves. Two
// outputs, 16 apart, share 16 bits: pairs are added as they are, modulo 2^16, and their high halves by themselves;
// carry_over tells them apart. Memory has a register of pairs, then one of their high halves.
struct Int16 {
  using weight_t = int16_t;  // as in the sums
  using sum_t = int16_t;
  using Wide = Int16;
  static constexpr int kUnit = row_unit(Precision::int8);

  template <int kWidth, int kBytes>
  struct Sum {
    static constexpr int kRegister = kWidth % kBytes == 0 ? kBytes : kBytes / 2;  // bytes
    using Pairs = Register<uint16_t, kRegister>;
    static constexpr int kLanes = kRegister / 2, kRegisters = kWidth / kLanes;
    Pairs v[kRegisters];

    IIRSNN_INLINE void load(const int16_t* sums) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) v[i] = load_register<Pairs>(sums + i * kLanes);
    }
    IIRSNN_INLINE void add(const int16_t* row, int digit) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) v[i] += load_register<Pairs>(row + i * kLanes) << digit;
    }
    IIRSNN_INLINE void end(int) {}
    IIRSNN_INLINE void store(int16_t* sums) const {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) store_register(sums + i * kLanes, v[i]);
    }
  };
};

// The low half of a pair is stored plus kExcess, so that it takes nothing from the high half.
struct Int8 {
  using weight_t = int8_t;
  using sum_t = int16_t;
  using Wide = Int16;
  static constexpr int kUnit = row_unit(Precision::int8);

  template <int kWidth, int kBytes>
  struct Sum : Int16::Sum<kWidth, kBytes> {
    using Base = Int16::Sum<kWidth, kBytes>;
    using Base::kLanes, Base::kRegisters, Base::v;
    using typename Base::Pairs;

    IIRSNN_INLINE void add(const int8_t* row, int digit) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; i += 2) {
        const Pairs pairs = load_register<Pairs>(row + i * kLanes);
        v[i] += pairs << digit;
        v[i + 1] += high(pairs) << digit;
      }
    }
    // After `rows` additions; one that counts 2^digit times is so many.
    IIRSNN_INLINE void end(int rows) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; i += 2) v[i] -= uint16_t(rows * kExcess) + Pairs{};
    }
    static IIRSNN_INLINE void widen(const int8_t* row, int16_t* wide) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; i += 2) {
        const Pairs pairs = load_register<Pairs>(row + i * kLanes);
        store_register(wide + i * kLanes, pairs - uint16_t(kExcess));
        store_register(wide + (i + 1) * kLanes, high(pairs));
      }
    }

   private:
    static IIRSNN_INLINE Pairs high(const Pairs& pairs) {
      return (Pairs)((Register<int16_t, Base::kRegister>)pairs >> 8);
    }
  };
};

// totals += sums * 2^digit; sums = 0. Of registers of kBytes.
template <int kBytes>
IIRSNN_INLINE void carry_over(const Additions& work, int digit) {
  using Pairs = Register<uint16_t, kBytes>;
  using Half = Register<int16_t, kBytes / 2>;
  using Ints = Register<int32_t, kBytes>;
  constexpr int kLanes = kBytes / 2;
  int16_t* sums = static_cast<int16_t*>(work.sums);
  const auto add = [&](const int16_t* part, int32_t* totals) IIRSNN_INLINE_LAMBDA {
    const Ints wide = widened<Ints>(load_register<Half>(part));
    store_register(totals, load_register<Ints>(totals) + (wide << digit));
  };
  const int64_t pairs = work.positions * work.width / 2;
  for (int64_t pair = 0; pair < pairs; pair += kLanes, sums += 2 * kLanes) {
    const Pairs high = load_register<Pairs>(sums + kLanes);
    store_register(sums, load_register<Pairs>(sums) - (high << 8));
    IIRSNN_REGISTERS
    for (int part = 0; part < kLanes; part += kLanes / 2) {
      int32_t* const totals = work.totals + (pair + part) / 16 * 32 + (pair + part) % 16;
      add(sums + part, totals);
      add(sums + kLanes + part, totals + 16);
    }
    store_register(sums, Pairs{});
    store_register(sums + kLanes, Pairs{});
  }
}

}  // namespace iirsnn::event
