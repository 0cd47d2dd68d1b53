/* Runs the program that a build generated: memory, threads, errors. C11, libc, libm and pthread alone.
 *
 * Compiled against plain headers so that one object serves glibc and Android: no errno, no stdio, no structure whose
 * layout differs between them.
 */
#define DANCE_MODEL_NO_OPEN
#include "program.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define ALIGNMENT 64u
#define HIDDEN __attribute__((visibility("hidden")))
#define EXPORTED __attribute__((visibility("default")))
#define MOST_THREADS 64
#define ERROR_BYTES 512
#define SPINS 20000 /* of a waiting thread before it sleeps: some 20 to 50 microseconds */
#define MOST_INPUTS 64
#define FUTEX_WAIT_PRIVATE 128
#define FUTEX_WAKE_PRIVATE 129

enum { ANY_INTEGER = 1, ANY_REAL = 3, ANY_DLTENSOR = 7 };

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

static size_t rounded(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static void *aligned(size_t bytes) {
  void *memory = NULL;
  return posix_memalign(&memory, ALIGNMENT, bytes ? rounded(bytes) : ALIGNMENT) ? NULL : memory;
}

static void say(char *to, size_t room, const char *const *parts, size_t count) {
  size_t used = 0;
  if (!to || !room) return;
  for (size_t part = 0; part < count; part++) {
    size_t length = parts[part] ? strlen(parts[part]) : 0;
    if (length > room - 1 - used) length = room - 1 - used;
    if (length) memcpy(to + used, parts[part], length);
    used += length;
  }
  to[used] = 0;
}

#define SAY(to, room, ...)                                     \
  do {                                                         \
    const char *said[] = {__VA_ARGS__};                        \
    say((to), (room), said, sizeof said / sizeof said[0]);     \
  } while (0)

/* -- threads: a pool for each model, whose workers spin a little between loops and then sleep ----------------------- */

/* Scratch memory of one thread, given back in the order of a stack. Where it is too small, a request gets memory of
 * its own and the next call finds enough: no call after the first allocates. */
typedef struct {
  char *base;
  size_t room, used, wanted, most;
} scratch;

typedef struct pool {
  int32_t size; /* threads, the caller's among them */
  pthread_t workers[MOST_THREADS];
  scratch scratches[MOST_THREADS];
  _Atomic uint64_t ticket; /* number of the loop << 32 | next task of it */
  _Atomic uint32_t loop;   /* the same number, which sleepers wait on */
  _Atomic(parallel_body) body;
  _Atomic(void *) closure;
  _Atomic int32_t tasks, done, failed, sleeping, ends;
  char error[ERROR_BYTES]; /* of the task that failed first */
  const int32_t *cpus;
  int32_t cpu_count;
} pool;

typedef struct {
  pool *of;
  int32_t index;
} seat;

static _Thread_local seat here;
static _Thread_local char last_error[ERROR_BYTES];

static long futex(_Atomic uint32_t *word, int operation, uint32_t value) {
  return syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void stay_on(const int32_t *cpus, int32_t count) {
  unsigned long bits[16] = {0};
  const int32_t word = 8 * (int32_t)sizeof bits[0];
  for (int32_t each = 0; each < count; each++)
    if (cpus[each] >= 0 && cpus[each] < 16 * word) bits[cpus[each] / word] |= 1ul << (cpus[each] % word);
  syscall(SYS_sched_setaffinity, 0, sizeof bits, bits);
}

/* Take tasks of loop `number` until none is left. A task is ours once the ticket was raised within the same loop, which
 * cannot end before it is done: what was read of the loop before is then what belongs to it. */
static void take_tasks(pool *threads, uint32_t number) {
  for (;;) {
    uint64_t ticket = atomic_load_explicit(&threads->ticket, memory_order_acquire);
    int32_t tasks = atomic_load_explicit(&threads->tasks, memory_order_relaxed);
    parallel_body body = atomic_load_explicit(&threads->body, memory_order_relaxed);
    void *closure = atomic_load_explicit(&threads->closure, memory_order_relaxed);
    int32_t task = (int32_t)(ticket & 0xffffffffu);
    if ((uint32_t)(ticket >> 32) != number || task >= tasks) return;
    if (!atomic_compare_exchange_weak_explicit(&threads->ticket, &ticket, ticket + 1, memory_order_acq_rel,
                                               memory_order_relaxed))
      continue;
    parallel_env env = {NULL, tasks};
    last_error[0] = 0;
    if (body(task, &env, closure) && !atomic_exchange(&threads->failed, 1))
      SAY(threads->error, sizeof threads->error, last_error);
    atomic_fetch_add_explicit(&threads->done, 1, memory_order_release);
  }
}

static void *work(void *argument) {
  seat *given = argument;
  pool *threads = given->of;
  here = *given;
  free(given);
  if (threads->cpu_count) stay_on(threads->cpus, threads->cpu_count);
  uint32_t seen = 0;
  while (!atomic_load(&threads->ends)) {
    uint32_t number = atomic_load_explicit(&threads->loop, memory_order_acquire);
    if (number == seen) {
      int spun = 0;
      while (number == seen && spun++ < SPINS) {
        pause_briefly();
        number = atomic_load_explicit(&threads->loop, memory_order_acquire);
      }
      if (number == seen) {
        atomic_fetch_add(&threads->sleeping, 1);
        if (!atomic_load(&threads->ends)) futex(&threads->loop, FUTEX_WAIT_PRIVATE, seen);
        atomic_fetch_sub(&threads->sleeping, 1);
      }
      continue;
    }
    seen = number;
    take_tasks(threads, number);
  }
  return NULL;
}

static int run_loop(parallel_body body, void *closure, int tasks) {
  pool *threads = here.of;
  if (tasks <= 0) tasks = threads ? threads->size : 1;
  if (!threads || here.index || threads->size == 1 || tasks == 1) { /* also a loop inside a task */
    parallel_env env = {NULL, tasks};
    for (int task = 0; task < tasks; task++)
      if (body(task, &env, closure)) return -1;
    return 0;
  }
  uint32_t number = atomic_load_explicit(&threads->loop, memory_order_relaxed) + 1;
  if (!number) number = 1;
  atomic_store_explicit(&threads->body, body, memory_order_relaxed);
  atomic_store_explicit(&threads->closure, closure, memory_order_relaxed);
  atomic_store_explicit(&threads->tasks, tasks, memory_order_relaxed);
  atomic_store_explicit(&threads->done, 0, memory_order_relaxed);
  atomic_store_explicit(&threads->failed, 0, memory_order_relaxed);
  atomic_store_explicit(&threads->ticket, (uint64_t)number << 32, memory_order_release);
  atomic_store(&threads->loop, number);
  if (atomic_load(&threads->sleeping)) futex(&threads->loop, FUTEX_WAKE_PRIVATE, 1u << 30);
  take_tasks(threads, number);
  for (int spun = 0; atomic_load_explicit(&threads->done, memory_order_acquire) < tasks; spun++) {
    if (spun < SPINS) pause_briefly();
    else sched_yield();
  }
  if (!atomic_load(&threads->failed)) return 0;
  SAY(last_error, sizeof last_error, threads->error);
  return -1;
}

static void end_pool(pool *threads) {
  atomic_store(&threads->ends, 1);
  atomic_fetch_add(&threads->loop, 1);
  futex(&threads->loop, FUTEX_WAKE_PRIVATE, 1u << 30);
  for (int32_t each = 1; each < threads->size; each++) pthread_join(threads->workers[each], NULL);
  for (int32_t each = 0; each < MOST_THREADS; each++) free(threads->scratches[each].base);
}

static int start_pool(pool *threads, int32_t size, const dance_options *options) {
  threads->size = 1;
  threads->cpus = options->cpus;
  threads->cpu_count = options->cpus ? options->cpu_count : 0;
  while (threads->size < size) {
    seat *given = malloc(sizeof *given);
    if (!given) return 0;
    *given = (seat){threads, threads->size};
    if (pthread_create(&threads->workers[threads->size], NULL, work, given)) {
      free(given);
      return 0;
    }
    threads->size++;
  }
  return 1;
}

/* -- what kernels call ---------------------------------------------------------------------------------------------- */

static scratch *my_scratch(void) { return here.of ? &here.of->scratches[here.index] : NULL; }

static void *take_workspace(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  scratch *mine = my_scratch();
  size_t size = rounded(bytes ? bytes : 1);
  if (!mine) return aligned(size);
  if (!mine->wanted && mine->room < mine->most) { /* nothing of it is in use: make it as large as was ever wanted */
    free(mine->base);
    mine->base = aligned(mine->most);
    mine->room = mine->base ? mine->most : 0;
  }
  mine->wanted += size;
  if (mine->wanted > mine->most) mine->most = mine->wanted;
  if (mine->room - mine->used < size) {
    size_t *own = aligned(size + ALIGNMENT);
    if (!own) return NULL;
    *own = size;
    return (char *)own + ALIGNMENT;
  }
  char *given = mine->base + mine->used;
  mine->used += size;
  return given;
}

static int give_workspace(int device, int id, void *memory) {
  (void)device, (void)id;
  scratch *mine = my_scratch();
  char *given = memory;
  if (!mine) {
    free(memory);
  } else if (mine->base && given >= mine->base && given < mine->base + mine->room) {
    mine->wanted -= mine->used - (size_t)(given - mine->base);
    mine->used = (size_t)(given - mine->base);
  } else if (given) {
    size_t *own = (size_t *)(given - ALIGNMENT);
    mine->wanted -= *own;
    free(own);
  }
  return 0;
}

extern void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) __attribute__((weak));

/* Hidden: kernels of this library find it here, whatever else is loaded. Outside a model's call it is TVM's virtual
 * machine that runs them, and that is told. */
HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  say(last_error, sizeof last_error, (const char *const *)parts, count < 0 ? 0 : (size_t)count);
  if (!here.of && TVMFFIErrorSetRaisedFromCStr) TVMFFIErrorSetRaisedFromCStr(kind, last_error);
}

extern void *__TVMBackendAllocWorkspace __attribute__((weak));
extern void *__TVMBackendFreeWorkspace __attribute__((weak));
extern void *__TVMBackendParallelLaunch __attribute__((weak));

/* A hook that the kernels do not use is not there; one that TVM's own loader has filled stays as it is. */
static void fill(void **hook, void *function) {
  void *none = NULL;
  if (hook) __atomic_compare_exchange_n(hook, &none, function, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static void fill_hooks(void) {
  fill(&__TVMBackendAllocWorkspace, (void *)take_workspace);
  fill(&__TVMBackendFreeWorkspace, (void *)give_workspace);
  fill(&__TVMBackendParallelLaunch, (void *)run_loop);
}

/* -- weights: mapped where the file lets kernels read them in place, copied once where it does not ------------------ */

typedef struct {
  _Atomic int32_t users;
  const unsigned char *file;
  size_t file_bytes;
  void *mapped;
  size_t mapped_bytes;
  unsigned char *copies;
  size_t copied_bytes;
  const void **tensors;
} weight_set;

static void leave_weights(weight_set *weights) {
  if (!weights || atomic_fetch_sub(&weights->users, 1) != 1) return;
  if (weights->mapped) munmap(weights->mapped, weights->mapped_bytes);
  free(weights->copies);
  free(weights->tensors);
  free(weights);
}

static int map_weights(weight_set *weights, int fd, int64_t offset, int64_t length) {
  int64_t page = sysconf(_SC_PAGESIZE), into = offset % page;
  if (offset < 0 || length <= 0) return 0;
  void *mapped = mmap(NULL, (size_t)(length + into), PROT_READ, MAP_PRIVATE, fd, (off_t)(offset - into));
  if (mapped == MAP_FAILED) return 0;
  weights->mapped = mapped;
  weights->mapped_bytes = (size_t)(length + into);
  weights->file = (const unsigned char *)mapped + into;
  weights->file_bytes = (size_t)length;
  return 1;
}

static const unsigned char *after(const unsigned char *at, const unsigned char *end, const char *text) {
  size_t length = strlen(text);
  for (; at && (size_t)(end - at) >= length; at++)
    if (!memcmp(at, text, length)) return at + length;
  return NULL;
}

static const unsigned char *number(const unsigned char *at, const unsigned char *end, uint64_t *value) {
  int digits = 0;
  while (at && at < end && (*at == ' ' || *at == ',' || *at == '[')) at++;
  for (*value = 0; at && at < end && *at >= '0' && *at <= '9' && digits < 19; digits++) *value = *value * 10 + (uint64_t)(*at++ - '0');
  return digits && digits < 19 ? at : NULL;
}

/* Where the tensor stands in a safetensors file, or NULL where the header does not have it as it must be. */
static const unsigned char *find_weight(const weight_set *weights, const program_weight *wanted) {
  uint64_t header = 0, begin, end;
  char quoted[ERROR_BYTES];
  if (weights->file_bytes < 8) return NULL;
  memcpy(&header, weights->file, 8);
  if (header > weights->file_bytes - 8) return NULL;
  const unsigned char *data = weights->file + 8 + header, *at = weights->file + 8;
  SAY(quoted, sizeof quoted, "\"", wanted->name, "\":{");
  at = after(at, data, quoted);
  if (!at) return NULL;
  const unsigned char *close = after(at, data, "}");
  if (!close) return NULL;
  SAY(quoted, sizeof quoted, "\"dtype\":\"", wanted->dtype, "\"");
  if (!after(at, close, quoted)) return NULL;
  at = number(after(at, close, "\"data_offsets\":"), close, &begin);
  at = number(at, close, &end);
  if (!at || begin > end || end > weights->file_bytes - 8 - header || end - begin != wanted->bytes) return NULL;
  return data + begin;
}

static int place_weights(weight_set *weights, const dance_program *program, char *error, size_t room) {
  size_t copied = 0;
  weights->tensors = calloc((size_t)program->weight_count, sizeof *weights->tensors);
  if (!weights->tensors) return DANCE_NO_MEMORY;
  for (int32_t each = 0; each < program->weight_count; each++) {
    const unsigned char *found = find_weight(weights, &program->weights[each]);
    if (!found) {
      SAY(error, room, "the file of weights has no tensor ", program->weights[each].name,
          " of the size and type that this library was built with: give the file that lies beside it");
      return DANCE_BAD_WEIGHTS;
    }
    weights->tensors[each] = found;
    if ((uintptr_t)found % ALIGNMENT) copied += rounded(program->weights[each].bytes);
  }
  weights->copied_bytes = copied;
  if (copied && !(weights->copies = aligned(copied))) return DANCE_NO_MEMORY;
  copied = 0;
  for (int32_t each = 0; each < program->weight_count; each++) {
    if (!((uintptr_t)weights->tensors[each] % ALIGNMENT)) continue;
    memcpy(weights->copies + copied, weights->tensors[each], program->weights[each].bytes);
    weights->tensors[each] = weights->copies + copied;
    copied += rounded(program->weights[each].bytes);
  }
  return DANCE_OK;
}

static int open_weights(weight_set *weights, const dance_options *options, char *error, size_t room) {
  if (options->weights) {
    weights->file = options->weights;
    weights->file_bytes = options->weights_bytes;
    return DANCE_OK;
  }
  if (options->weights_length) {
    if (map_weights(weights, options->weights_fd, options->weights_offset, options->weights_length)) return DANCE_OK;
    SAY(error, room, "the weights cannot be mapped from the given descriptor: check offset and length");
    return DANCE_BAD_WEIGHTS;
  }
  if (!options->weights_path) {
    SAY(error, room, "this model has its weights in a file: give weights_path, a descriptor or its bytes");
    return DANCE_BAD_ARGUMENT;
  }
  int fd = open(options->weights_path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    SAY(error, room, options->weights_path, " cannot be opened");
    return DANCE_BAD_WEIGHTS;
  }
  int mapped = map_weights(weights, fd, 0, (int64_t)lseek(fd, 0, SEEK_END));
  close(fd);
  if (mapped) return DANCE_OK;
  SAY(error, room, options->weights_path, " cannot be mapped: it is empty, or memory is short");
  return DANCE_BAD_WEIGHTS;
}

/* -- models --------------------------------------------------------------------------------------------------------- */

struct dance_model {
  const dance_program *program;
  weight_set *weights;
  unsigned char *arena;
  unsigned char *staging; /* inputs whose addresses kernels would not take, and a stream's state */
  unsigned char *next;    /* a stream's state after this frame */
  size_t arena_bytes, staging_bytes;
  size_t *staged; /* where each input's copy lies in staging */
  dl_tensor *tensors;
  tvm_any *arguments;
  dance_layer_time *times;
  int profiles, streams;
  _Atomic int cancelled;
  pool threads;
  char error[ERROR_BYTES];
};

static int refuse(dance_model *model, int code, const char *sentence) {
  SAY(model->error, sizeof model->error, sentence);
  return code;
}

static void destroy(dance_model *model) {
  if (!model) return;
  end_pool(&model->threads);
  leave_weights(model->weights);
  free(model->arena);
  free(model->staging);
  free(model->next);
  free(model->staged);
  free(model->tensors);
  free(model->arguments);
  free(model->times);
  free(model);
}

static void *data_of(const dance_model *model, const program_tensor *tensor) {
  switch (tensor->where) {
    case IN_ARENA: return model->arena + tensor->offset;
    case IN_CONSTANTS: return (void *)(model->program->constants + tensor->offset);
    case IN_WEIGHT: return (void *)model->weights->tensors[tensor->index];
    default: return model->staging + model->staged[tensor->index];
  }
}

/* Tensors and arguments are laid out once: a call fills in the addresses of its inputs alone. */
static void lay_out(dance_model *model) {
  const dance_program *program = model->program;
  for (int32_t each = 0; each < program->tensor_count; each++) {
    const program_tensor *tensor = &program->tensors[each];
    dl_tensor *view = &model->tensors[each];
    view->data = data_of(model, tensor);
    view->device.type = 1; /* a processor */
    view->rank = tensor->rank;
    view->dtype.code = tensor->kind;
    view->dtype.bits = tensor->bits;
    view->dtype.lanes = 1;
    view->shape = (int64_t *)tensor->shape;
    view->strides = (int64_t *)tensor->strides;
  }
  for (int32_t each = 0; each < program->argument_count; each++) {
    const program_argument *argument = &program->arguments[each];
    tvm_any *any = &model->arguments[each];
    switch (argument->kind) {
      case TENSOR: any->type = ANY_DLTENSOR, any->value.pointer = &model->tensors[argument->tensor]; break;
      case INTEGER: any->type = ANY_INTEGER, any->value.integer = argument->integer; break;
      case REAL: any->type = ANY_REAL, any->value.real = argument->real; break;
    }
  }
  for (int32_t each = 0; each < program->step_count; each++) model->times[each].kernel = program->steps[each].kernel;
}

static int is_streaming(const dance_program *program) {
  if (program->input_count < 2 || program->input_count != program->output_count) return 0;
  for (int32_t each = 1; each < program->input_count; each++) {
    const dance_tensor *in = &program->inputs[each], *out = &program->outputs[each];
    if (in->rank != out->rank || in->kind != out->kind || in->bits != out->bits) return 0;
    for (int32_t axis = 0; axis < in->rank; axis++)
      if (in->shape[axis] != out->shape[axis]) return 0;
  }
  return 1;
}

static int allocate(dance_model *model, const dance_options *options, char *error, size_t room) {
  const dance_program *program = model->program;
  int32_t threads = options->threads ? options->threads : program->threads;
  if (threads < 1 || threads > MOST_THREADS) {
    SAY(error, room, "a model runs on 1 to 64 threads: give another number of them");
    return DANCE_BAD_ARGUMENT;
  }
  model->staged = calloc((size_t)program->input_count + 1, sizeof *model->staged);
  if (!model->staged) return DANCE_NO_MEMORY;
  for (int32_t each = 0; each < program->input_count; each++) {
    model->staged[each] = model->staging_bytes;
    model->staging_bytes += rounded(program->inputs[each].bytes);
  }
  model->streams = is_streaming(program);
  model->arena_bytes = program->arena_bytes;
  model->arena = aligned(model->arena_bytes);
  model->staging = aligned(model->staging_bytes);
  model->tensors = calloc((size_t)program->tensor_count + 1, sizeof *model->tensors);
  model->arguments = calloc((size_t)program->argument_count + 1, sizeof *model->arguments);
  model->times = calloc((size_t)program->step_count + 1, sizeof *model->times);
  if (!model->arena || !model->staging || !model->tensors || !model->arguments || !model->times) return DANCE_NO_MEMORY;
  memset(model->staging, 0, model->staging_bytes);
  if (model->streams && !(model->next = aligned(model->staging_bytes))) return DANCE_NO_MEMORY;
  return start_pool(&model->threads, threads, options) ? DANCE_OK : DANCE_NO_MEMORY;
}

static dance_model *create(const dance_options *options, char *error, size_t room) {
  static const dance_options none;
  dance_options given = none;
  if (options) memcpy(&given, options, options->size && options->size < sizeof given ? options->size : sizeof given);
  SAY(error, room, "memory is short");
  dance_model *model = calloc(1, sizeof *model);
  if (!model) return NULL;
  model->program = &dance_the_program;
  int code = DANCE_OK;
  if (given.share) {
    model->weights = given.share->weights;
    if (model->weights) atomic_fetch_add(&model->weights->users, 1);
  } else if (model->program->weight_count) {
    code = DANCE_NO_MEMORY;
    if ((model->weights = calloc(1, sizeof *model->weights))) {
      atomic_store(&model->weights->users, 1);
      code = open_weights(model->weights, &given, error, room);
      if (!code) code = place_weights(model->weights, model->program, error, room);
    }
  }
  if (!code) code = allocate(model, &given, error, room);
  if (code) {
    destroy(model);
    return NULL;
  }
  lay_out(model);
  fill_hooks();
  if (error && room) error[0] = 0;
  return model;
}

static int64_t now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
}

static int run_steps(dance_model *model) {
  const dance_program *program = model->program;
  seat outside = here;
  int code = DANCE_OK;
  here = (seat){&model->threads, 0};
  for (int32_t each = 0; each < program->step_count && !code; each++) {
    const program_step *step = &program->steps[each];
    tvm_any result = {0, 0, {0}};
    int64_t start = model->profiles ? now() : 0;
    last_error[0] = 0;
    if (step->call(NULL, model->arguments + step->first, step->count, &result)) {
      SAY(model->error, sizeof model->error, step->kernel, ": ", last_error);
      code = DANCE_FAILED;
    }
    if (model->profiles) {
      model->times[each].calls++;
      model->times[each].nanoseconds += now() - start;
    }
    if (atomic_load_explicit(&model->cancelled, memory_order_relaxed))
      code = refuse(model, DANCE_CANCELLED, "the call was cancelled");
  }
  here = outside;
  return code;
}

static void bind_inputs(dance_model *model, const void *const *inputs) {
  const dance_program *program = model->program;
  for (int32_t each = 0; each < program->tensor_count; each++) {
    const program_tensor *tensor = &program->tensors[each];
    if (tensor->where != IN_INPUT) continue;
    const void *given = inputs[tensor->index];
    if ((uintptr_t)given % ALIGNMENT) {
      void *copy = model->staging + model->staged[tensor->index];
      memcpy(copy, given, tensor->bytes);
      given = copy;
    }
    model->tensors[each].data = (void *)given;
  }
}

static int run(dance_model *model, const void *const *inputs, void *const *outputs) {
  const dance_program *program = model->program;
  for (int32_t each = 0; each < program->input_count; each++)
    if (!inputs || !inputs[each]) return refuse(model, DANCE_BAD_ARGUMENT, "an input's address is missing");
  for (int32_t each = 0; each < program->output_count; each++)
    if (!outputs || !outputs[each]) return refuse(model, DANCE_BAD_ARGUMENT, "an output's address is missing");
  atomic_store(&model->cancelled, 0);
  bind_inputs(model, inputs);
  int code = run_steps(model);
  for (int32_t each = 0; each < program->output_count && !code; each++)
    memcpy(outputs[each], model->tensors[program->output_tensors[each]].data, program->outputs[each].bytes);
  return code;
}

static int step(dance_model *model, const void *frame, void *output) {
  const dance_program *program = model->program;
  const void *inputs[MOST_INPUTS];
  if (!model->streams || program->input_count > MOST_INPUTS)
    return refuse(model, DANCE_BAD_ARGUMENT, "this is no streaming network: its outputs after the first are not its next state");
  if (!frame || !output) return refuse(model, DANCE_BAD_ARGUMENT, "a frame's or output's address is missing");
  inputs[0] = frame;
  for (int32_t each = 1; each < program->input_count; each++) inputs[each] = model->staging + model->staged[each];
  atomic_store(&model->cancelled, 0);
  bind_inputs(model, inputs);
  int code = run_steps(model);
  if (code) return code;
  memcpy(output, model->tensors[program->output_tensors[0]].data, program->outputs[0].bytes);
  for (int32_t each = 1; each < program->output_count; each++)
    memcpy(model->next + model->staged[each], model->tensors[program->output_tensors[each]].data, program->outputs[each].bytes);
  unsigned char *before = model->staging;
  model->staging = model->next;
  model->next = before;
  return DANCE_OK;
}

static int reset(dance_model *model) {
  memset(model->staging, 0, model->staging_bytes);
  return DANCE_OK;
}

static int profile(dance_model *model, int on) {
  for (int32_t each = 0; each < model->program->step_count; each++) model->times[each].calls = model->times[each].nanoseconds = 0;
  model->profiles = on;
  return DANCE_OK;
}

static int32_t layers(dance_model *model, const dance_layer_time **times) {
  if (times) *times = model->times;
  return model->program->step_count;
}

static void cancel(dance_model *model) { atomic_store(&model->cancelled, 1); }

static const char *error_of(const dance_model *model) { return model->error; }

static size_t memory(const dance_model *model) {
  size_t bytes = sizeof *model + model->arena_bytes + model->staging_bytes * (model->next ? 2 : 1);
  if (model->weights && atomic_load(&model->weights->users) == 1)
    bytes += model->weights->mapped_bytes + model->weights->copied_bytes;
  for (int32_t each = 0; each < MOST_THREADS; each++) bytes += model->threads.scratches[each].room;
  return bytes;
}

static const char *describe(void) { return dance_the_program.description; }

static int32_t inputs(const dance_tensor **tensors) {
  if (tensors) *tensors = dance_the_program.inputs;
  return dance_the_program.input_count;
}

static int32_t outputs(const dance_tensor **tensors) {
  if (tensors) *tensors = dance_the_program.outputs;
  return dance_the_program.output_count;
}

EXPORTED const dance_api *dance_model_api(uint32_t version) {
  static const dance_api api = {
      .version = DANCE_VERSION, .size = sizeof(dance_api), .describe = describe, .inputs = inputs, .outputs = outputs,
      .create = create, .run = run, .step = step, .reset = reset, .profile = profile, .layers = layers,
      .cancel = cancel, .error = error_of, .memory = memory, .destroy = destroy};
  return version == DANCE_VERSION ? &api : NULL;
}
