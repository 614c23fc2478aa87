/* Runs a spiking network that `iirsnn deploy` wrote: C, no dependency but libc and libstdc++.
 *
 * Every function that returns iirsnn_status leaves its outputs alone unless it returns IIRSNN_OK; iirsnn_message() says
 * why. Any number of threads may use one network at once. No C++ exception and no C++ type crosses this interface.
 */
#ifndef IIRSNN_H
#define IIRSNN_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define IIRSNN_API __attribute__((visibility("default")))
#else
#define IIRSNN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  IIRSNN_OK = 0,
  IIRSNN_BAD_ARGUMENT = 1,
  IIRSNN_BAD_FILE = 2, /* missing, truncated, damaged, of another program or of a newer version */
  IIRSNN_NO_MEMORY = 3,
  IIRSNN_FAILED = 4 /* anything else that the system refused */
} iirsnn_status;

typedef struct iirsnn_network iirsnn_network;
typedef struct iirsnn_call iirsnn_call;

typedef struct {
  int64_t channels, height, width; /* of an image */
  int64_t classes;                 /* logits of an image */
  int64_t timesteps;
  int64_t layers;
  int64_t weight_bytes; /* in memory */
  int prepares_pixels;  /* whether the file says what iirsnn_prepare needs */
} iirsnn_facts;

typedef struct {
  const char* kind; /* "neurons", "max_pool", ...; of the network, as is `name` */
  const char* name;
  int64_t channels, height, width;                /* of what it gives */
  int64_t neurons;                                /* of an image */
  int64_t spikes;                                 /* of the whole call, as is all that follows */
  int64_t additions;                              /* of weights and counts */
  int64_t multiplications;                        /* of real values, those of the image among them */
  int64_t weight_bytes, spike_bytes, value_bytes; /* read and written */
  double milliseconds;
} iirsnn_layer;

/* "1.2.3" of the library. */
IIRSNN_API const char* iirsnn_version(void);

/* The instruction set that it runs on, "portable", "avx2" or "avx512": the best that there is, or what
 * IIRSNN_CPU_CAPABILITY or iirsnn_set_capability asked for; NULL where that variable asks for what is not there. All
 * give the same bits. */
IIRSNN_API const char* iirsnn_capability(void);
IIRSNN_API iirsnn_status iirsnn_set_capability(const char* name);

/* Why the last call of this thread that did not return IIRSNN_OK failed: one line, valid until the next one. */
IIRSNN_API const char* iirsnn_message(void);

/* Reads a network and takes what it needs: the file or the bytes may go afterwards. A build without files gives
 * IIRSNN_FAILED for every path. */
IIRSNN_API iirsnn_status iirsnn_load_file(const char* path, iirsnn_network** network);
IIRSNN_API iirsnn_status iirsnn_load_memory(const void* bytes, size_t size, iirsnn_network** network);

/* A network is counted: whoever keeps it retains it, and the last release frees it. NULL is ignored. */
IIRSNN_API void iirsnn_retain(iirsnn_network* network);
IIRSNN_API void iirsnn_release(iirsnn_network* network);

IIRSNN_API iirsnn_status iirsnn_describe(const iirsnn_network* network, iirsnn_facts* facts);

/* UTF-8; NULL where the file names no such class. Valid as long as the network. */
IIRSNN_API const char* iirsnn_class_name(const iirsnn_network* network, int64_t index);

/* The JSON object of "images" in the file's notes: how image files become what the network takes; NULL without one. */
IIRSNN_API const char* iirsnn_image_notes(const iirsnn_network* network);

/* What the network takes, float [channels][height][width], from pixels [height][width][colours] of its own height and
 * width: 1 colour for gray, 3 for red, green, blue. The mean and standard deviation are the file's. */
IIRSNN_API iirsnn_status iirsnn_prepare(const iirsnn_network* network, const uint8_t* pixels, int64_t height,
                                        int64_t width, int64_t colours, float* image);

/* images [count][channels][height][width] -> logits [count][classes], by at most `threads` threads (0: as many as there
 * are cores). `call`, which may be NULL, becomes what this call did; iirsnn_free_call frees it. */
IIRSNN_API iirsnn_status iirsnn_run(const iirsnn_network* network, const float* images, int64_t count, int threads,
                                    float* logits, iirsnn_call** call);
IIRSNN_API iirsnn_status iirsnn_layer_of(const iirsnn_call* call, int64_t index, iirsnn_layer* layer);

/* Bytes of the memory that the call worked in, beside the weights: spikes, real values, sums. */
IIRSNN_API iirsnn_status iirsnn_memory_of(const iirsnn_call* call, int64_t* bytes);

/* The spikes of a layer with neurons: bits [count][timesteps][height][width][words of 64 channels], channel 0 in the
 * lowest bit. Valid as long as the call. */
IIRSNN_API iirsnn_status iirsnn_spikes_of(const iirsnn_call* call, int64_t index, const uint64_t** bits);
IIRSNN_API void iirsnn_free_call(iirsnn_call* call);

#ifdef __cplusplus
}
#endif
#endif
