/* Threads: a pool for each model, whose workers spin a little between loops and then sleep; and what kernels call. */
#include "runtime.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PARTS 4 /* tasks that a kernel's loop is cut into for each thread, so that who is ahead can help the others */
#define MOST_PORTIONS 0xffff
/* A waiting thread keeps its core for a while, as the next loop is mostly near; then it lets others have the core, since
 * the thread that it waits for may be among them; and at last it sleeps. */
#define SPIN_NS 10000
#define SLEEP_NS 500000
#define LARGE_PAGE ((size_t)2 << 20)
#define FUTEX_WAIT_PRIVATE 128
#define FUTEX_WAKE_PRIVATE 129

int64_t now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
}

/* Large memory lies on large pages where the system has them: fewer faults, and fewer misses of the translation cache. */
void *aligned(size_t bytes) {
  const size_t alignment = bytes >= 2 * LARGE_PAGE ? LARGE_PAGE : ALIGNMENT;
  void *memory = NULL;
  if (posix_memalign(&memory, alignment, bytes ? rounded(bytes) : ALIGNMENT)) return NULL;
  if (alignment == LARGE_PAGE) madvise(memory, rounded(bytes) / LARGE_PAGE * LARGE_PAGE, MADV_HUGEPAGE);
  return memory;
}

void say(char *to, size_t room, const char *const *parts, size_t count) {
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

/* Tasks of a portion, so that there are no more than MOST_PORTIONS of them. */
static int32_t grain_of(int32_t tasks) { return 1 + (tasks - 1) / MOST_PORTIONS; }

/* What a thread begins loop `number` with. */
static uint64_t whole_share(uint32_t number, int32_t portions, int32_t share, int32_t size) {
  const uint64_t front = (uint64_t)portions * (uint64_t)share / (uint64_t)size;
  const uint64_t back = (uint64_t)portions * (uint64_t)(share + 1) / (uint64_t)size;
  return (uint64_t)number << 32 | back << 16 | front;
}

static void add_processor(processors *to, int32_t cpu) {
  const int32_t word = 8 * (int32_t)sizeof to->bits[0];
  if (cpu >= 0 && cpu < MOST_CPUS) to->bits[cpu / word] |= 1ul << (cpu % word);
}

static int stay_on(const processors *cpus) { return !syscall(SYS_sched_setaffinity, 0, sizeof cpus->bits, cpus->bits); }

/* Whether a thread may run on each of the processors: the system refuses a set only where it may run on none of it. In a
 * thread of its own, so that the caller's stays where it is. */
static void *try_processors(void *argument) {
  const dance_options *options = argument;
  for (int32_t each = 0; each < options->cpu_count; each++) {
    processors alone = {{0}};
    add_processor(&alone, options->cpus[each]);
    if (!stay_on(&alone)) return NULL;
  }
  return argument;
}

static int pin(pool *threads, const dance_options *options, char *error, size_t room) {
  dance_options given = *options;
  pthread_t trial;
  void *tried = NULL;
  if (!options->cpus || !options->cpu_count) return DANCE_OK;
  if (pthread_create(&trial, NULL, try_processors, &given)) return DANCE_NO_MEMORY;
  pthread_join(trial, &tried);
  if (!tried || options->cpu_count < 0) {
    SAY(error, room, "options.cpus names a processor that this machine lacks or this process may not use: leave it out");
    return DANCE_BAD_ARGUMENT;
  }
  for (int32_t each = 0; each < options->cpu_count; each++) add_processor(&threads->cpus, options->cpus[each]);
  threads->pinned = 1;
  return DANCE_OK;
}

/* Waiting since `start`: 0 once it is time to sleep. */
static int wait_a_little(int64_t start) {
  for (int each = 0; each < 4; each++) pause_briefly();
  int64_t waited = now() - start;
  if (waited >= SPIN_NS) sched_yield();
  return waited < SLEEP_NS;
}

/* Run the tasks of one portion of the loop. */
static void run_portion(pool *threads, int32_t portion, parallel_body body, void *closure) {
  const int32_t tasks = atomic_load_explicit(&threads->tasks, memory_order_relaxed);
  const int32_t grain = grain_of(tasks);
  for (int32_t task = portion * grain; task < tasks && task < (portion + 1) * grain; task++) {
    parallel_env env = {NULL, tasks};
    last_error[0] = 0;
    if (body(task, &env, closure) && !atomic_exchange(&threads->failed, 1))
      SAY(threads->error, sizeof threads->error, last_error);
  }
}

/* Take portions of loop `number` until none is left: from the front of this thread's own share, which is the same part of
 * each loop, as what one layer wrote the next one reads; then from the back of what others have not come to. A portion is
 * ours once the share was changed within the same loop, which cannot end before it is done: what was read of the loop
 * before is then what belongs to it. */
static void take_portions(pool *threads, uint32_t number) {
  int32_t taken = 0;
  here.inside = 1;
  for (int32_t from = 0; from < threads->size; from++) {
    _Atomic uint64_t *share = &threads->shares[(here.index + from) % threads->size].left;
    for (;;) {
      uint64_t left = atomic_load_explicit(share, memory_order_acquire);
      parallel_body body = atomic_load_explicit(&threads->body, memory_order_relaxed);
      void *closure = atomic_load_explicit(&threads->closure, memory_order_relaxed);
      const int32_t front = (int32_t)(left & MOST_PORTIONS), back = (int32_t)(left >> 16 & MOST_PORTIONS);
      if ((uint32_t)(left >> 32) != number || front == back) break;
      if (!atomic_compare_exchange_weak_explicit(share, &left, from ? left - (1u << 16) : left + 1, memory_order_acq_rel,
                                                 memory_order_relaxed))
        continue;
      run_portion(threads, from ? back - 1 : front, body, closure);
      taken++;
    }
  }
  here.inside = 0;
  if (taken) atomic_fetch_add_explicit(&threads->done, taken, memory_order_release);
}

static void *work(void *argument) {
  seat *given = argument;
  pool *threads = given->of;
  here = *given;
  free(given);
  if (threads->pinned) stay_on(&threads->cpus);
  uint32_t seen = 0;
  while (!atomic_load(&threads->ends)) {
    uint32_t number = atomic_load_explicit(&threads->loop, memory_order_acquire);
    if (number == seen) {
      int64_t start = now();
      int waits = 1;
      while (number == seen && (waits = wait_a_little(start)))
        number = atomic_load_explicit(&threads->loop, memory_order_acquire);
      if (!waits) {
        atomic_fetch_add(&threads->sleeping, 1);
        if (!atomic_load(&threads->ends)) futex(&threads->loop, FUTEX_WAIT_PRIVATE, seen);
        atomic_fetch_sub(&threads->sleeping, 1);
      }
      continue;
    }
    seen = number;
    take_portions(threads, number);
  }
  return NULL;
}

int run_loop(parallel_body body, void *closure, int tasks) {
  pool *threads = here.of;
  if (tasks <= 0) tasks = threads && threads->size > 1 ? PARTS * threads->size : 1;
  if (!threads || here.inside || threads->size == 1 || tasks == 1) {
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
  const int32_t portions = 1 + (tasks - 1) / grain_of(tasks);
  for (int32_t share = 0; share < threads->size; share++)
    atomic_store_explicit(&threads->shares[share].left, whole_share(number, portions, share, threads->size), memory_order_release);
  atomic_store(&threads->loop, number);
  if (atomic_load(&threads->sleeping)) futex(&threads->loop, FUTEX_WAKE_PRIVATE, 1u << 30);
  take_portions(threads, number);
  for (int64_t start = now(); atomic_load_explicit(&threads->done, memory_order_acquire) < portions;) wait_a_little(start);
  if (!atomic_load(&threads->failed)) return 0;
  SAY(last_error, sizeof last_error, threads->error);
  return -1;
}

void end_pool(pool *threads) {
  atomic_store(&threads->ends, 1);
  atomic_fetch_add(&threads->loop, 1);
  futex(&threads->loop, FUTEX_WAKE_PRIVATE, 1u << 30);
  for (int32_t each = 1; each < threads->size; each++) pthread_join(threads->workers[each], NULL);
  for (int32_t each = 0; each < MOST_THREADS; each++) free(threads->scratches[each].base);
}

seat enter(pool *threads) {
  seat before = here;
  here = (seat){threads, 0, 0};
  return before;
}

void leave(seat before) { here = before; }

void lend(void *memory, size_t bytes) {
  scratch *mine = &here.of->scratches[here.index];
  mine->lent = memory;
  mine->lent_room = bytes;
  mine->lent_used = 0;
}

void forget_error(void) { last_error[0] = 0; }

void complain(const char *const *parts, size_t count) { say(last_error, sizeof last_error, parts, count); }

const char *kernel_error(void) { return last_error; }

int start_pool(pool *threads, int32_t size, const dance_options *options, char *error, size_t room) {
  threads->size = 1;
  const int code = pin(threads, options, error, room);
  while (!code && threads->size < size) {
    seat *given = malloc(sizeof *given);
    if (!given) return DANCE_NO_MEMORY;
    *given = (seat){threads, threads->size, 0};
    if (pthread_create(&threads->workers[threads->size], NULL, work, given)) {
      free(given);
      return DANCE_NO_MEMORY;
    }
    threads->size++;
  }
  return code;
}

/* -- what kernels call ---------------------------------------------------------------------------------------------- */

static scratch *my_scratch(void) { return here.of ? &here.of->scratches[here.index] : NULL; }

static void *take_workspace(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  scratch *mine = my_scratch();
  size_t size = rounded(bytes ? bytes : 1);
  if (!mine) return aligned(size);
  if (mine->lent_room - mine->lent_used >= size) {
    char *lent = mine->lent + mine->lent_used;
    mine->lent_used += size;
    return lent;
  }
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
  } else if (mine->lent && given >= mine->lent && given < mine->lent + mine->lent_room) {
    mine->lent_used = (size_t)(given - mine->lent);
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

/* Hidden: kernels of this library find it here, whatever else is loaded. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  (void)kind;
  say(last_error, sizeof last_error, (const char *const *)parts, count < 0 ? 0 : (size_t)count);
}

/* The hooks through which kernels call. Defined here and hidden, so that TVM's loader, where it opens this library, finds
 * none to fill: the threads are those of the model, whoever opened it. */
void *__TVMBackendAllocWorkspace = (void *)take_workspace;
void *__TVMBackendFreeWorkspace = (void *)give_workspace;
void *__TVMBackendParallelLaunch = (void *)run_loop;
