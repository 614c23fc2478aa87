/* board < NET: the logits of a white image, by a build without files, as hexadecimal floating-point numbers. */
#include <stdio.h>
#include <stdlib.h>

#include "iirsnn.h"

static void need(int right, const char* why) {
  if (right) return;
  fprintf(stderr, "board: %s\n", why);
  exit(1);
}

static void ask(iirsnn_status status) { need(status == IIRSNN_OK, iirsnn_message()); }

int main(void) {
  static unsigned char bytes[1 << 20]; /* a board has the network in its flash memory */
  const size_t size = fread(bytes, 1, sizeof bytes, stdin);
  iirsnn_network* network = NULL;
  need(iirsnn_load_file("/dev/null", &network) == IIRSNN_FAILED && network == NULL,
       "no status of a build without files");
  fprintf(stderr, "%s\n", iirsnn_message());
  ask(iirsnn_load_memory(bytes, size, &network));
  iirsnn_facts facts;
  ask(iirsnn_describe(network, &facts));
  const int64_t values = facts.channels * facts.height * facts.width;
  float* image = malloc(sizeof(float) * (size_t)values);
  float* logits = malloc(sizeof(float) * (size_t)facts.classes);
  need(image && logits, "no memory");
  for (int64_t i = 0; i < values; ++i) image[i] = 1;
  ask(iirsnn_run(network, image, 1, 1, logits, NULL));
  for (int64_t i = 0; i < facts.classes; ++i) printf("%a\n", logits[i]);
  iirsnn_release(network);
  free(image);
  free(logits);
  return 0;
}
