/* What the parts of the runtime know of one another. C11, libc, libm and pthread alone.
 *
 * Compiled against plain headers so that one object serves glibc and Android: no errno, no stdio, no structure whose
 * layout differs between them.
 */
#ifndef DANCE_RUNTIME_H
#define DANCE_RUNTIME_H

#define DANCE_MODEL_NO_OPEN
#include "program.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 64u
#define EXPORTED __attribute__((visibility("default")))
#define MOST_THREADS 64
#define ERROR_BYTES 512

/* TVM's types of arguments (tvm/ffi/c_api.h). */
enum {
  ANY_NONE = 0,
  ANY_INTEGER = 1,
  ANY_REAL = 3,
  ANY_DLTENSOR = 7,
  ANY_RAW_STRING = 8,
  ANY_SMALL_STRING = 11,
  ANY_STRING = 65,
  ANY_TENSOR = 70
};

typedef struct {
  void *data;
  struct { int32_t type, id; } device;
  int32_t rank;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} dl_tensor;

typedef struct {
  void *sync;
  int32_t tasks;
} parallel_env;

typedef int (*parallel_body)(int task, parallel_env *env, void *closure);

/* -- threads.c: memory, sentences, and a pool of threads for each model --------------------------------------------- */

static inline size_t rounded(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

int64_t now(void); /* nanoseconds of a clock that never goes back */
void *aligned(size_t bytes);
void say(char *to, size_t room, const char *const *parts, size_t count);

#define SAY(to, room, ...)                                     \
  do {                                                         \
    const char *said[] = {__VA_ARGS__};                        \
    say((to), (room), said, sizeof said / sizeof said[0]);     \
  } while (0)

/* Scratch memory of one thread, given back in the order of a stack. What of the arena is free during a step is lent to
 * the caller's thread first. Where its own is too small, a request gets memory apart and the next call finds enough: no
 * call after the first allocates. */
typedef struct {
  char *base, *lent;
  size_t room, used, wanted, most, lent_room, lent_used;
} scratch;

/* What is left of a loop of what one thread takes first: number of the loop << 32 | behind the last portion << 16 | the
 * first one. Each a cache line apart from the next. */
typedef struct {
  _Atomic uint64_t left;
  char apart[ALIGNMENT - sizeof(uint64_t)];
} task_share;

/* A set of processors, as sched_setaffinity takes it. */
#define MOST_CPUS 1024
typedef struct {
  unsigned long bits[MOST_CPUS / 8 / sizeof(unsigned long)];
} processors;

typedef struct pool {
  int32_t size; /* threads, the caller's among them */
  pthread_t workers[MOST_THREADS];
  scratch scratches[MOST_THREADS];
  task_share shares[MOST_THREADS];
  _Atomic uint32_t loop; /* its number, which sleepers wait on */
  _Atomic(parallel_body) body;
  _Atomic(void *) closure;
  _Atomic int32_t tasks, done, failed, sleeping, ends;
  char error[ERROR_BYTES]; /* of the task that failed first */
  processors cpus;
  int32_t pinned; /* whether its threads stay on these */
} pool;

/* Whose call this thread is in, as which of its threads, and whether within a task of a loop. */
typedef struct {
  pool *of;
  int32_t index, inside;
} seat;

/* DANCE_OK, or a code with a sentence in `error`. */
int start_pool(pool *threads, int32_t size, const dance_options *options, char *error, size_t room);
void end_pool(pool *threads);
seat enter(pool *threads); /* gives the seat to leave to */
void leave(seat before);
int run_loop(parallel_body body, void *closure, int tasks);
void lend(void *memory, size_t bytes); /* scratch for this thread, instead of what was lent before */
void forget_error(void);
void complain(const char *const *parts, size_t count);
const char *kernel_error(void); /* what a kernel or driver said last in this thread */

#define COMPLAIN(...)                                          \
  do {                                                         \
    const char *said_parts[] = {__VA_ARGS__};                  \
    complain(said_parts, sizeof said_parts / sizeof said_parts[0]); \
  } while (0)

/* -- processor.c ---------------------------------------------------------------------------------------------------- */

/* Whether this processor has what Linux lists under the name, and the system keeps its registers. */
int processor_has(const char *instructions);

/* -- digest.c ------------------------------------------------------------------------------------------------------- */

#define DIGEST_BYTES 32

/* SHA-256 over the SHA-256 of each 128 KiB of `data`, on the threads of the pool that the caller has entered. 0: no memory. */
int tree_digest(const unsigned char *data, uint64_t bytes, unsigned char digest[DIGEST_BYTES]);

/* -- weights.c: what is stored, verified and prepared for the kernels ------------------------------------------------ */

typedef struct weight_set weight_set;

/* DANCE_OK with `found`, or a code with a sentence in `error`. The caller has entered its pool. */
int load_weights(weight_set **found, const dance_options *options, char *error, size_t room);
void share_weights(weight_set *weights);
void leave_weights(weight_set *weights);
const void *weight_data(const weight_set *weights, int32_t index);
size_t weight_bytes(const weight_set *weights); /* 0 where several models share them */

/* -- prepare.c ------------------------------------------------------------------------------------------------------ */

/* Bring `weight` from where it is stored to `to`, in the form that its kernel reads; 0: no memory. */
int prepare_weight(const program_weight *weight, const unsigned char *stored, void *to);

/* -- processor_steps.c or gpu_steps.c: where a model's tensors lie and its steps run --------------------------------- */

typedef struct machine machine;

/* DANCE_OK with `found`, or a code with a sentence in `error`. The caller has entered its pool. `share`: a machine whose
 * weights are used; `streams`: outputs after the first become the next inputs. */
int open_machine(machine **found, const dance_options *options, const machine *share, int streams, char *error, size_t room);
void close_machine(machine *on);
/* The rest gives 0, or not 0 with a sentence in kernel_error(). */
/* Of a call's inputs (NULL: the state that keep_state left) and its first `count` outputs, which kernels may write to. */
int give_addresses(machine *on, const void *const *inputs, void *const *outputs, int32_t count);
int run_step(machine *on, int32_t index);
int finish_steps(machine *on); /* a GPU runs them while run_step has returned */
int take_output(machine *on, int32_t index, void *to);
int keep_state(machine *on);
int forget_state(machine *on);
int show_tensor(machine *on, int32_t tensor, dance_view *view);
size_t machine_bytes(const machine *on);

/* -- work.c --------------------------------------------------------------------------------------------------------- */

/* Add what the step executed that has just run; not 0, with a sentence in kernel_error(), where its lists cannot be had. */
int count_work(machine *on, const program_work *work, int64_t *macs);

#endif
