/* Memory that shows what is read or written where nothing should be: while switched on, every aligned allocation and
 * every workspace of compiled code stands alone between two pages that cannot be touched, ends at the second one, and
 * is filled with one byte. What was freed cannot be touched either. Writes into the slack around a buffer are counted.
 * Preloaded into a worker (memory.py), and off until `guard_on`. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE ((size_t)4096)
#define ARENA ((size_t)1 << 36)

extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

struct block {
  uint32_t pages;
  uint32_t slack; /* bytes before the buffer, from the start of its first page */
  size_t size;
  unsigned char fill;
};

static char *arena;
static struct block *blocks; /* by the number of a buffer's first page */
static size_t top = 1;
static int live, on, damaged;
static unsigned char fill_byte = 0xff;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void reserve(void) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  arena = mmap(0, ARENA, PROT_NONE, flags, -1, 0);
  blocks = mmap(0, ARENA / PAGE * sizeof(struct block), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (arena == MAP_FAILED || blocks == MAP_FAILED) arena = 0;
}

static void *take(size_t align, size_t size) {
  size_t room = size ? size : 1, pages;
  char *start, *buffer;
  pthread_mutex_lock(&lock);
  if (!arena) reserve();
  pages = (room + align + PAGE - 1) / PAGE;
  if (!arena || align > PAGE || (top + pages + 1) * PAGE > ARENA) {
    pthread_mutex_unlock(&lock);
    return 0;
  }
  start = arena + top * PAGE;
  if (mprotect(start, pages * PAGE, PROT_READ | PROT_WRITE)) {
    pthread_mutex_unlock(&lock);
    return 0;
  }
  buffer = (char *)((uintptr_t)(start + pages * PAGE - room) & ~(uintptr_t)(align - 1));
  memset(start, fill_byte, pages * PAGE);
  size_t first = (buffer - arena) / PAGE;
  blocks[first] = (struct block){pages - (first - top), buffer - (arena + first * PAGE), size, fill_byte};
  if (first != top) mprotect(start, (first - top) * PAGE, PROT_NONE);
  top += pages + 1;
  live++;
  pthread_mutex_unlock(&lock);
  return buffer;
}

static void drop(char *buffer) {
  size_t first = (buffer - arena) / PAGE;
  char *start = arena + first * PAGE;
  pthread_mutex_lock(&lock);
  struct block block = blocks[first];
  char *end = start + block.pages * PAGE;
  for (char *byte = start; byte < buffer; byte++) damaged += (unsigned char)*byte != block.fill;
  for (char *byte = buffer + block.size; byte < end; byte++) damaged += (unsigned char)*byte != block.fill;
  mmap(start, block.pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  live--;
  pthread_mutex_unlock(&lock);
}

static int is_ours(void *buffer) { return arena && (char *)buffer >= arena && (char *)buffer < arena + ARENA; }

int posix_memalign(void **buffer, size_t align, size_t size) {
  *buffer = on ? take(align, size) : 0;
  if (!*buffer) *buffer = __libc_memalign(align, size);
  return *buffer ? 0 : ENOMEM;
}

void free(void *buffer) {
  if (is_ours(buffer)) {
    drop(buffer);
  } else {
    __libc_free(buffer);
  }
}

/* In place of TVM's workspaces, which keep what they once had. */
void *guard_alloc_workspace(int kind, int device, uint64_t size, int code, int bits) {
  void *buffer = 0;
  (void)kind, (void)device, (void)code, (void)bits;
  return posix_memalign(&buffer, 64, size) ? 0 : buffer;
}

int guard_free_workspace(int kind, int device, void *buffer) {
  (void)kind, (void)device;
  free(buffer);
  return 0;
}

/* From here on allocations are guarded and filled with `byte`. */
void guard_on(int byte) {
  pthread_mutex_lock(&lock);
  if (!live) top = 1;
  fill_byte = byte;
  on = 1;
  pthread_mutex_unlock(&lock);
}

void guard_off(void) { on = 0; }

/* Bytes that were written around buffers since the last call, as far as those buffers were freed. */
int guard_damaged(void) {
  int bytes = damaged;
  damaged = 0;
  return bytes;
}
