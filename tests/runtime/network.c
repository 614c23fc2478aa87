/* network NET IMAGES COUNT OUT: what a network gives for float32 images, and the bits of its layers, by C alone. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "iirsnn.h"

static void need(int right, const char* why) {
  if (right) return;
  fprintf(stderr, "network: %s\n", why);
  exit(1);
}

static void ask(iirsnn_status status) { need(status == IIRSNN_OK, iirsnn_message()); }

static void* whole(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  need(file != NULL, "the file cannot be opened");
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  void* bytes = malloc(*size);
  need(bytes != NULL && fread(bytes, 1, *size, file) == *size, "the file cannot be read");
  fclose(file);
  return bytes;
}

int main(int count, char** arguments) {
  need(count == 5, "expected NET IMAGES COUNT OUT");
  size_t size;
  void* bytes = whole(arguments[1], &size);
  iirsnn_network *network, *mapped;
  ask(iirsnn_load_memory(bytes, size, &network));
  free(bytes);
  ask(iirsnn_load_file(arguments[1], &mapped));
  float* images = whole(arguments[2], &size);
  const int64_t number = atoll(arguments[3]);
  iirsnn_facts facts;
  ask(iirsnn_describe(network, &facts));
  need(size == sizeof(float) * (size_t)(number * facts.channels * facts.height * facts.width), "images of that size");

  const size_t logits_size = sizeof(float) * (size_t)(number * facts.classes);
  float *logits = malloc(logits_size), *same = malloc(logits_size);
  need(logits && same, "no memory");
  iirsnn_call* call;
  ask(iirsnn_run(network, images, number, 2, logits, &call));
  ask(iirsnn_run(mapped, images, number, 1, same, NULL));
  need(memcmp(logits, same, logits_size) == 0, "the same logits from memory as from the file");
  iirsnn_release(mapped);
  iirsnn_release(network); /* the call keeps it */

  FILE* out = fopen(arguments[4], "wb");
  need(out != NULL, "OUT cannot be opened");
  fwrite(logits, 1, logits_size, out);
  for (int64_t i = 0; i < facts.layers; ++i) {
    iirsnn_layer layer;
    ask(iirsnn_layer_of(call, i, &layer));
    const int64_t numbers[] = {layer.spikes, layer.additions, layer.multiplications};
    fwrite(numbers, 1, sizeof numbers, out);
    if (!layer.neurons) continue;
    const uint64_t* bits;
    ask(iirsnn_spikes_of(call, i, &bits));
    const int64_t words = number * facts.timesteps * layer.height * layer.width * ((layer.channels + 63) / 64);
    fwrite(bits, sizeof(uint64_t), (size_t)words, out);
  }
  need(fclose(out) == 0, "OUT cannot be written");
  iirsnn_free_call(call);
  free(images);
  free(logits);
  free(same);
  printf("%s\n", iirsnn_capability());
  return 0;
}
