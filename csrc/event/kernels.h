// The loops of event-driven inference over raw memory: additions for events, then the neurons that fire.
//
// Spikes are bits, channels innermost: words [image][row][column][word] of 64 channels, one such array ("plane") for
// each binary digit of a pooled count, or a single one for plain spikes. Weights are rows [channel] of outputs. The
// "sums" of a strip of output positions, [position][output], stay in the cache from the bias to the spike.
//
// Every output's additions are made in one order, whatever the processor and the number of threads: the same bits.
#pragma once

#include <cstdint>

#include "lif/lif_step.h"
#include "simd/memory.h"
#include "simd/scalar.h"

namespace iirsnn::event {

enum class Precision : int { fp32 = 0, bf16 = 1, int8 = 2 };  // of weights

// Outputs that rows are padded to.
constexpr int row_unit(Precision precision) { return precision == Precision::fp32 ? 16 : 32; }
constexpr bool is_integer(Precision precision) { return precision == Precision::int8; }
constexpr int weight_bytes(Precision precision) {
  return precision == Precision::fp32 ? 4 : precision == Precision::int8 ? 1 : 2;
}

// Of int8 weights and of bf16 ones, outputs 16 apart lie side by side; the first of two int8 ones is stored plus this.
constexpr int kExcess = 128;

// One kernel tap over a strip: the rectangle of output positions whose input pixel lies inside the image.
struct Tap {
  int64_t in;   // words from the strip's first image to the first input pixel
  int64_t out;  // positions from the strip's first to the rectangle's first
  int rows, columns;
};

struct Additions {
  const uint64_t* bits;  // plane 0 of the strip's first image
  int planes;
  int64_t plane;  // words from plane to plane
  int64_t images, image_in, image_out;
  int64_t row_in, row_out, column_in;  // "in" counts words, "out" positions; columns are 1 position apart

  const Tap* taps;
  int tap_count;

  int first_word, words;
  uint64_t first_mask, last_mask;  // channels of the first and the last word that take part
  int channels;                    // of them all: the rows of one tap
  bool whole;                      // they are all that the source has

  const void* weights;  // [word][tap][channel of the word][pitch]
  int64_t pitch;        // outputs from row to row
  void* sums;           // float or int16_t [position][width]
  int width;            // outputs; a multiple of row_unit
  int64_t positions;    // of the strip

  // int8 weights: 16-bit sums, which begin and end at zero, are carried over to these before they can overflow.
  int32_t* totals;         // [position][width]
  const uint8_t* carries;  // Carry [word][tap]
};

// What a block of int8 weights, one word of one tap, asks for before its rows are added.
enum class Carry : uint8_t {
  none = 0,
  before = 1,    // the sums so far have to be carried over
  by_digit = 2,  // as well, and again after each binary digit of the pooled counts
};

struct Work {
  int64_t events = 0;     // rows added
  int64_t doublings = 0;  // of rows that a pooled count adds 2^digit times: an addition each

  IIRSNN_INLINE void count(uint64_t bits, int digit) {
    const int64_t rows = __builtin_popcountll(bits);
    events += rows;
    doublings += digit * rows;
  }
};

// Adds the row of every set bit of every tap to the sums.
// A tile keeps the sums of a position in registers while it reads the bits of one tap and word (see tile_width).
// A stream passes over long rows, four or eight at a time.
void add_tile(Precision precision, const Additions& work, Work& done);
void add_stream(Precision precision, const Additions& work, Work& done);

// The first layer: real-valued input, so a dense convolution.
struct Products {
  const float* image;  // [channel][row][column] of the strip's first image
  int64_t images, image_in, image_out;
  int64_t channel_in;
  int64_t row_in, row_out, column_in;  // "in" counts floats
  const Tap* taps;                     // in floats as well
  int tap_count;
  int first_channel, channels;
  const float* weights;  // [tap][channel][pitch]
  int64_t pitch;
  float* sums;
  int width;
};
void add_products(const Products& work);

// Sums -> spikes, over time where there is more than one timestep.
struct Neurons {
  const void* sums;  // [image][timestep][position][width], or without timesteps when the current is constant
  bool integer;      // int32_t sums: current = sum * scale + bias
  bool constant;
  int64_t images, timesteps, positions;
  int width;    // outputs of a row of sums
  int outputs;  // the first of them that are real
  const float* scale;
  const float* bias;       // of integer sums; of others the sums began with it
  const float* threshold;  // [width]; so are scale, bias and leak
  const float* leak;
  float v_reset;
  Reset reset;
  const uint64_t* skip;  // counts added to the current, laid out as the output, or null
  int skip_planes;
  int64_t skip_plane;   // words from plane to plane
  float skip_unit;      // what a count of one adds
  uint64_t* spikes;     // word of the first output, image, timestep and position
  int64_t words;        // from position to position
  int64_t image_words;  // from image (and timestep) to image
};
struct Fired {
  int64_t spikes = 0;
  int64_t skips = 0;  // bits of the skip that were added
};
Fired fire(const Neurons& work);

// Sums -> logits: what the layer without neurons gives, summed over the timesteps.
struct Logits {
  const void* sums;  // [image][timestep][width]
  bool integer, constant;
  int64_t images, timesteps;
  int width, outputs;
  const float* scale;
  const float* bias;
  float* logits;  // [image][stride], from the first output on
  int64_t stride;
};
void read_out(const Logits& work);

}  // namespace iirsnn::event
