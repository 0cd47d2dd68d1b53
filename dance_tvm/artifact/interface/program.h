/* What a build generates (program.c) and the runtime walks: tensors, steps, weights and where memory lies. */
#ifndef DANCE_PROGRAM_H
#define DANCE_PROGRAM_H

#include "dance_model.h"

/* TVM's calling convention (tvm/ffi/c_api.h, dlpack.h). */
typedef struct {
  int32_t type;
  uint32_t length; /* of a string of up to seven bytes, which lies in the value */
  union {
    int64_t integer;
    double real;
    void *pointer;
    char text[8];
  } value;
} tvm_any;

typedef int (*tvm_function)(void *self, const tvm_any *arguments, int32_t count, tvm_any *result);

typedef enum { IN_ARENA, IN_INPUT, IN_WEIGHT } place;

typedef struct {
  place where;
  int32_t index;  /* of the input or weight */
  int64_t offset; /* in the arena */
  size_t bytes;
  const int64_t *shape;
  const int64_t *strides;
  int32_t rank;
  uint8_t kind, bits;
  int32_t output; /* which one lies in the same piece of the arena, from 1 on; 0: none */
} program_tensor;

typedef enum { TENSOR, INTEGER, REAL } argument_kind;

typedef struct {
  argument_kind kind;
  int32_t tensor;
  int64_t integer;
  double real;
} program_argument;

/* The tensors that say what a kernel executed (docs/kernels.md, lists; a Winograd kernel's runs are its segments). */
typedef enum {
  TAP_ENTRIES, TAP_PLANES, ROWS_OUT, SEGMENTS, BLOCKS, COUNTS, IN_CHANNELS, OUT_CHANNELS, COLUMN_STARTS, OUT_FRAMES,
  POSITIONS,
  DECISION, /* which of two kernels ran, whose work stands one behind the other */
  OPERANDS
} operand;

/* The same in every call; by lists of rows, or of a Winograd kernel's tiles; by masks. */
typedef enum { FIXED, ROWS, TILES, MASKS } work_kind;

typedef struct {
  work_kind kind;
  int64_t macs;  /* FIXED: of a call; TILES: of the dense layer */
  int64_t dense; /* TILES: multiply-accumulates of all tiles at one tap, of one plane */
  int32_t depth; /* input channels of a row, or of an entry of kernel groups */
  int32_t filters, group;      /* output channels; of one group */
  int32_t operands[OPERANDS];  /* numbers of tensors, -1 where there is none */
  const int32_t *taps;         /* MASKS: N, T, H, W of the outputs, and taps inside the clip by frame, row, column */
} program_work;

typedef struct {
  tvm_function call; /* NULL on a GPU */
  const char *kernel;
  int32_t first, count;    /* its arguments */
  size_t free, free_bytes; /* the largest part of the arena where nothing lies meanwhile */
  int32_t launch, launches; /* on a GPU: where they begin in gpu_code, and their number */
  int32_t work;             /* -1: it is no convolution, or what it executed cannot be told */
} program_step;

/* A launch of one of a GPU's kernels: where the numbers of the tensors that it is given begin in gpu_code.given. */
typedef struct {
  const char *kernel;
  int32_t first, count;
  uint32_t blocks[3], threads[3]; /* blocks on each axis, threads of a block */
} gpu_launch;

typedef struct {
  const char *code; /* OpenCL C or PTX, which the driver compiles; a zero ends it */
  const char *needs; /* the GPU's architecture (PTX) */
  int32_t half;      /* computes in half precision */
  const gpu_launch *launches;
  int32_t launch_count;
  const int32_t *given;
} gpu_code;

/* How numbers are stored: as they are; those that are not zero, behind a bit for each; as half-precision floats; as
 * differences from one to the next. */
typedef enum { PLAIN, SPARSE, HALF, DELTAS } encoding;

/* What a kernel reads: the stored tensor, its panels, or the panels of its transform (schedules/preparation.py). */
typedef enum { AS_STORED, PANELS, WINOGRAD_PANELS } preparation;

typedef struct {
  uint64_t offset; /* in the store, a multiple of 64 */
  uint64_t stored; /* bytes there */
  uint64_t source; /* bytes of the tensor before it is prepared */
  uint64_t bytes;  /* of what the kernel reads */
  encoding encoding;
  preparation preparation;
  const int32_t *sizes;     /* of the preparation */
  const double *transforms; /* the same */
} program_weight;

typedef struct {
  const char *description;
  const char *const *instructions; /* that the kernels use */
  int32_t instruction_count;
  int32_t threads;
  size_t arena_bytes;
  const program_tensor *tensors;
  int32_t tensor_count;
  const program_argument *arguments;
  int32_t argument_count;
  const program_step *steps;
  int32_t step_count;
  const program_work *works;
  const program_weight *weights;
  int32_t weight_count;
  const unsigned char *store; /* within the library; NULL: a file beside it */
  uint64_t store_bytes;       /* of the whole file, where it is one */
  const unsigned char *digest; /* of all of them: `tree_digest` */
  const dance_tensor *inputs;
  int32_t input_count;
  const dance_tensor *outputs;
  const int32_t *output_tensors;
  int32_t output_count;
  const gpu_code *gpu; /* NULL: the steps run on the processor */
} dance_program;

extern const dance_program dance_the_program;

#endif
