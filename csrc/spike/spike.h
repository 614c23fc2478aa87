// Convolution of sparse inputs, forward and weight gradient, by events: one addition of a row for each nonzero input.
//
// A linear layer is a 1x1 convolution of images of one position. All arrays have channels innermost:
// activations [image][row][column][channel], weights [output][kernel row][kernel column][channel of the group].
// Every sum is made in one order whatever the instruction set; the weight gradient's depends on `splits` as well.
#pragma once

#include <cstdint>

#include "lif/lif.h"
#include "simd/memory.h"

namespace iirsnn::sparse {

constexpr int kTable = 256;  // values that a count may stand for

enum class Kind : int {
  bits = 0,    // uint64 [position][ceil(channels / 64)], bit c % 64 of word c / 64
  counts = 1,  // uint8 [position][channels]
  reals = 2,   // float [position][channels]
};

struct Source {
  Kind kind;
  const void* data;
  const float* table;  // [kTable]: the value of a count; of bits, table[1] is a spike's
};

struct Conv {
  int64_t images, channels, height, width;  // of the input
  int64_t outputs, out_height, out_width;   // of the output
  int64_t groups, kernel_h, kernel_w;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  int64_t positions() const { return images * height * width; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return outputs / groups; }
};

// ---- Packing ----

struct Pack {
  const void* x;  // [images][positions][channels], or [images][channels][positions] unless channels_last
  DType dtype;    // float32 or bfloat16
  bool channels_last;
  int64_t images, channels, positions;
  const float* table;  // [kTable] what each count stands for; bits use the first two
  float inverse_unit;  // 1 / table[1]
  void* packed;        // uint64 or uint8, see Kind; padding bits are zero
};
// Packs images [first, last). False, with packed undefined, where a value is none of the table's. Adds up nonzeros.
bool pack_bits(const Pack& work, int64_t first, int64_t last, int64_t& nonzeros);
bool pack_counts(const Pack& work, int64_t first, int64_t last, int64_t& nonzeros);

struct Unpack {
  Source source;  // bits or counts
  DType dtype;    // float32 or bfloat16
  int64_t images, channels, positions;
  void* x;  // [images][positions][channels]
};
void unpack(const Unpack& work, int64_t first, int64_t last);

// ---- Forward ----

struct Forward {
  Conv conv;
  Source source;
  const void* weight;
  DType dtype;  // of weight and out: float32 or bfloat16
  bool
      transposed;  // weight is that of the convolution whose input gradient this is: [channel][kernel][output], flipped
  const float* bias;  // [outputs] or null
  void* out;
};
int64_t forward_units(const Forward& work, int64_t threads);
void forward(const Forward& work, int64_t threads, int64_t first_unit, int64_t last_unit);

// ---- Weight gradient ----

struct WeightGrad {
  Conv conv;
  Source source;     // bits or counts
  const void* grad;  // of the output
  DType dtype;       // of grad and grad_weight: float32 or bfloat16
  void* grad_weight;
  int64_t splits;   // of the images, each with sums of its own
  float* partials;  // [splits * weight_grad_floats()] where splits > 1, aligned to a cache line
};
int64_t weight_grad_splits(const Conv& conv, int64_t threads);
int64_t weight_grad_floats(const Conv& conv);
int64_t weight_grad_units(const WeightGrad& work);
void weight_grad(const WeightGrad& work, int64_t first_unit, int64_t last_unit);
int64_t weight_grad_finish_units(const WeightGrad& work);  // 0 where splits is 1
void weight_grad_finish(const WeightGrad& work, int64_t first_unit, int64_t last_unit);

}  // namespace iirsnn::sparse
