/* Run an artifact on raw values and print what it answers.
 *
 *     cc -std=c11 -O2 -I HEADERS run_clip.c -o run_clip -ldl -lm -lpthread
 *     ./run_clip ARTIFACT INPUT.bin OUTPUT.bin [THREADS]
 *
 * INPUT.bin holds the inputs one after the other, dense, in the types that the artifact declares; OUTPUT.bin gets the
 * outputs in the same way. HEADERS is the folder of dance_model.h (`dance-tvm pack ARTIFACT --format c` lays it beside
 * the library). A file that holds several calls' inputs is run to its end, and OUTPUT.bin holds all answers.
 */
#include <dance_model.h>

#include <stdlib.h>
#include <time.h>

enum { PATH = 4096, SENTENCE = 512 };

static int fail(const char *sentence) {
  fprintf(stderr, "error: %s\n", sentence);
  return 2;
}

static double seconds(void) {
  struct timespec at;
  timespec_get(&at, TIME_UTC);
  return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

/* Buffers for `count` tensors; NULL where memory is short. */
static void **buffers(const dance_tensor *tensors, int32_t count) {
  void **made = calloc((size_t)count, sizeof *made);
  for (int32_t each = 0; made && each < count; each++) {
    size_t rounded = (tensors[each].bytes + 63) / 64 * 64; /* addresses that kernels read in place */
    made[each] = aligned_alloc(64, rounded ? rounded : 64);
    if (!made[each]) return NULL;
  }
  return made;
}

static void let_go(void **made, int32_t count) {
  for (int32_t each = 0; made && each < count; each++) free(made[each]);
  free(made);
}

int main(int argc, char **argv) {
  char library[PATH], weights[PATH], sentence[SENTENCE] = "";
  if (argc < 4) return fail("run_clip ARTIFACT INPUT.bin OUTPUT.bin [THREADS]");
  snprintf(library, sizeof library, "%s/model.so", argv[1]);
  snprintf(weights, sizeof weights, "%s/weights.safetensors", argv[1]);

  const dance_api *api = dance_model_open(library, sentence, sizeof sentence);
  if (!api) return fail(sentence);
  dance_options options = {.size = sizeof options, .threads = argc > 4 ? atoi(argv[4]) : 0, .weights_path = weights};
  dance_model *model = api->create(&options, sentence, sizeof sentence);
  if (!model) return fail(sentence);

  const dance_tensor *inputs, *outputs;
  const int32_t input_count = api->inputs(&inputs), output_count = api->outputs(&outputs);
  void **given = buffers(inputs, input_count), **answers = buffers(outputs, output_count);
  if (!given || !answers) return fail("memory is short");
  FILE *source = fopen(argv[2], "rb"), *sink = source ? fopen(argv[3], "wb") : NULL;
  if (!source) return fail("the input file cannot be read");
  if (!sink) return fail("the output file cannot be written");

  int calls = 0, code = DANCE_OK;
  double spent = 0;
  while (code == DANCE_OK) {
    int32_t read = 0;
    while (read < input_count && fread(given[read], inputs[read].bytes, 1, source) == 1) read++;
    if (read < input_count) break;
    const double start = seconds();
    code = api->run(model, (const void *const *)given, answers);
    spent += seconds() - start;
    for (int32_t each = 0; each < output_count && code == DANCE_OK; each++)
      fwrite(answers[each], outputs[each].bytes, 1, sink);
    calls++;
  }
  fclose(source);
  const int written = fclose(sink) == 0;
  if (!written || code != DANCE_OK || !calls) remove(argv[3]);
  if (!written) return fail("the output cannot be written");
  if (code != DANCE_OK) return fail(api->error(model));
  if (!calls) return fail("the input file is shorter than one call's inputs");
  printf("%s: %d call%s, %.3f ms each, %.1f MB\n", api->describe(), calls, calls == 1 ? "" : "s", 1e3 * spent / calls,
         (double)api->memory(model) / 1e6);

  let_go(given, input_count);
  let_go(answers, output_count);
  api->destroy(model);
  return 0;
}
