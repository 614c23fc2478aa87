/* classify NET IMAGE: the class of a binary PGM or PPM image (magic P5 or P6), and what its spikes cost.
 *
 *   cc -Iinclude classify.c -Llib -liirsnn -o classify
 */
#include <stdio.h>
#include <stdlib.h>

#include "iirsnn.h"

static void fail(const char* why) {
  fprintf(stderr, "classify: %s\n", why);
  exit(1);
}

static void need(iirsnn_status status) {
  if (status != IIRSNN_OK) fail(iirsnn_message());
}

/* A number of a PNM header, after white space and comments. */
static long header_number(FILE* file) {
  int c = fgetc(file);
  while (c == '#' || c == ' ' || c == '\t' || c == '\r' || c == '\n') {
    if (c == '#') {
      while (c != '\n' && c != EOF) c = fgetc(file);
    }
    c = fgetc(file);
  }
  long value = 0;
  if (c < '0' || c > '9') fail("expected a binary PGM or PPM image");
  for (; c >= '0' && c <= '9' && value < 100000; c = fgetc(file)) value = 10 * value + (c - '0');
  return value;
}

/* Pixels [height][width][colours] of a PNM file. */
static unsigned char* read_image(const char* path, long* height, long* width, long* colours) {
  FILE* file = fopen(path, "rb");
  if (!file) fail("the image cannot be opened");
  if (fgetc(file) != 'P') fail("expected a binary PGM or PPM image");
  const int kind = fgetc(file);
  if (kind != '5' && kind != '6') fail("expected a binary PGM or PPM image");
  *colours = kind == '5' ? 1 : 3;
  *width = header_number(file);
  *height = header_number(file);
  if (header_number(file) != 255) fail("expected 8 bits a colour");
  if (*width < 1 || *height < 1 || *width > 16384 || *height > 16384)
    fail("expected an image of at most 16384 x 16384");
  const size_t size = (size_t)*width * (size_t)*height * (size_t)*colours;
  unsigned char* pixels = malloc(size);
  if (!pixels) fail("no memory");
  if (fread(pixels, 1, size, file) != size) fail("the image is truncated");
  fclose(file);
  return pixels;
}

int main(int count, char** arguments) {
  if (count != 3) fail("expected NET IMAGE");
  iirsnn_network* network;
  iirsnn_facts facts;
  need(iirsnn_load_file(arguments[1], &network));
  need(iirsnn_describe(network, &facts));

  long height, width, colours;
  unsigned char* pixels = read_image(arguments[2], &height, &width, &colours);
  float* image = malloc(sizeof(float) * (size_t)(facts.channels * facts.height * facts.width));
  float* logits = malloc(sizeof(float) * (size_t)facts.classes);
  if (!image || !logits) fail("no memory");
  need(iirsnn_prepare(network, pixels, height, width, colours, image));

  iirsnn_call* call;
  need(iirsnn_run(network, image, 1, 1, logits, &call));
  int64_t best = 0, spikes = 0, additions = 0;
  for (int64_t i = 1; i < facts.classes; ++i) {
    if (logits[i] > logits[best]) best = i;
  }
  for (int64_t i = 0; i < facts.layers; ++i) {
    iirsnn_layer layer;
    need(iirsnn_layer_of(call, i, &layer));
    spikes += layer.spikes;
    additions += layer.additions;
  }
  const char* name = iirsnn_class_name(network, best);
  printf("class %lld%s%s, %lld spikes, %lld additions\n", (long long)best, name ? ": " : "", name ? name : "",
         (long long)spikes, (long long)additions);
  iirsnn_free_call(call);
  iirsnn_release(network);
  free(logits);
  free(image);
  free(pixels);
  return 0;
}
