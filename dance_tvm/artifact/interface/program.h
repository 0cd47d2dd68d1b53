/* What a build generates (program.c) and the runtime walks (runtime.c): tensors, steps and where memory lies. */
#ifndef DANCE_PROGRAM_H
#define DANCE_PROGRAM_H

#include "dance_model.h"

/* TVM's calling convention (tvm/ffi/c_api.h, dlpack.h). */
typedef struct {
  int32_t type;
  uint32_t zero;
  union {
    int64_t integer;
    double real;
    void *pointer;
  } value;
} tvm_any;

typedef int (*tvm_function)(void *self, const tvm_any *arguments, int32_t count, tvm_any *result);

typedef enum { IN_ARENA, IN_CONSTANTS, IN_INPUT, IN_WEIGHT } place;

typedef struct {
  place where;
  int32_t index;  /* of the input or weight */
  int64_t offset; /* in the arena or the constants */
  size_t bytes;
  const int64_t *shape;
  const int64_t *strides;
  int32_t rank;
  uint8_t kind, bits;
} program_tensor;

typedef enum { TENSOR, INTEGER, REAL } argument_kind;

typedef struct {
  argument_kind kind;
  int32_t tensor;
  int64_t integer;
  double real;
} program_argument;

typedef struct {
  tvm_function call;
  const char *kernel;
  int32_t first, count; /* its arguments */
} program_step;

typedef struct {
  const char *name; /* in the file of weights */
  const char *dtype;
  size_t bytes;
} program_weight;

typedef struct {
  const char *description;
  int32_t threads;
  size_t arena_bytes;
  const unsigned char *constants;
  const program_tensor *tensors;
  int32_t tensor_count;
  const program_argument *arguments;
  int32_t argument_count;
  const program_step *steps;
  int32_t step_count;
  const program_weight *weights;
  int32_t weight_count;
  const dance_tensor *inputs;
  int32_t input_count;
  const dance_tensor *outputs;
  const int32_t *output_tensors;
  int32_t output_count;
} dance_program;

extern const dance_program dance_the_program;

#endif
