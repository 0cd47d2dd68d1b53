/* What gpu_steps.c needs of a GPU's driver: opencl.c or cuda.c, of which a library has the one that it was built for.
 *
 * Functions give 0, or not 0 with a sentence in kernel_error().
 */
#ifndef DANCE_GPU_H
#define DANCE_GPU_H

#include "runtime.h"

typedef struct gpu gpu;             /* an open device with the program's kernels; for several models at once */
typedef struct gpu_queue gpu_queue; /* what one model has the device do, in order */
typedef uint64_t gpu_memory;        /* 0: none */

int open_gpu(gpu **found, const dance_options *options);
void close_gpu(gpu *on);
int take_memory(gpu *on, gpu_memory *found, size_t bytes);
void give_memory(gpu *on, gpu_memory memory);
/* A part of memory, which is given back before the whole is. */
int take_part(gpu *on, gpu_memory *found, gpu_memory whole, size_t offset, size_t bytes);
void give_part(gpu *on, gpu_memory part);

int open_queue(gpu_queue **found, gpu *on);
void close_queue(gpu_queue *queue);
/* What launch `index` of the program is given, from here on. */
int bind_launch(gpu_queue *queue, int32_t index, const gpu_memory *given);
int start_launch(gpu_queue *queue, int32_t index);
int copy_in(gpu_queue *queue, gpu_memory to, const void *from, size_t bytes); /* `from` is free again on return */
int copy_out(gpu_queue *queue, void *to, gpu_memory from, size_t bytes);      /* waits */
int copy_within(gpu_queue *queue, gpu_memory to, gpu_memory from, size_t bytes);
int finish_queue(gpu_queue *queue);

/* A function of a library by its name; NULL with a sentence where the library lacks it. */
void *function_of(void *library, const char *name);
/* The library `named`, or the first of `usual` (NULL ends them) that is there; NULL with `advice` in a sentence. */
void *open_driver(const char *named, const char *const *usual, const char *advice);

#endif
