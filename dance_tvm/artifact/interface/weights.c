/* Weights: the store is mapped and verified; what kernels read as it is stored stays there, the rest is prepared once. */
#include "runtime.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct weight_set {
  _Atomic int32_t users;
  const unsigned char *store;
  void *mapped;
  size_t mapped_bytes;
  unsigned char *prepared;
  size_t prepared_bytes;
  const void **tensors;
};

void share_weights(weight_set *weights) {
  if (weights) atomic_fetch_add(&weights->users, 1);
}

void leave_weights(weight_set *weights) {
  if (!weights || atomic_fetch_sub(&weights->users, 1) != 1) return;
  if (weights->mapped) munmap(weights->mapped, weights->mapped_bytes);
  if (weights->prepared) munmap(weights->prepared, weights->prepared_bytes);
  free(weights->tensors);
  free(weights);
}

const void *weight_data(const weight_set *weights, int32_t index) { return weights->tensors[index]; }

size_t weight_bytes(const weight_set *weights) {
  return atomic_load(&weights->users) == 1 ? weights->mapped_bytes + weights->prepared_bytes : 0;
}

static int map_store(weight_set *weights, int fd, int64_t offset, int64_t length) {
  int64_t page = sysconf(_SC_PAGESIZE), into = offset % page;
  struct stat file;
  if (offset < 0 || length <= 0 || fstat(fd, &file)) return 0;
  if (file.st_size < offset || file.st_size - offset < length) return 0; /* a read after a file's end is a fault */
  void *mapped = mmap(NULL, (size_t)(length + into), PROT_READ, MAP_PRIVATE, fd, (off_t)(offset - into));
  if (mapped == MAP_FAILED) return 0;
  weights->mapped = mapped;
  weights->mapped_bytes = (size_t)(length + into);
  weights->store = (const unsigned char *)mapped + into;
  return 1;
}

static int other_length(uint64_t length, char *error, size_t room) {
  if (length == dance_the_program.store_bytes) return DANCE_OK;
  SAY(error, room, "the file of weights has not the length that this library was built with: it is cut off, or another one's; "
      "give the file that lies beside the library");
  return DANCE_BAD_WEIGHTS;
}

static int open_store(weight_set *weights, const dance_options *options, char *error, size_t room) {
  if (options->weights) {
    weights->store = options->weights;
    return other_length(options->weights_bytes, error, room);
  }
  if (options->weights_length) {
    int code = other_length((uint64_t)options->weights_length, error, room);
    if (code) return code;
    if (map_store(weights, options->weights_fd, options->weights_offset, options->weights_length)) return DANCE_OK;
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
  int64_t length = (int64_t)lseek(fd, 0, SEEK_END);
  int code = length < 0 ? DANCE_BAD_WEIGHTS : other_length((uint64_t)length, error, room);
  if (length < 0) SAY(error, room, options->weights_path, " is not a file");
  if (!code && !map_store(weights, fd, 0, length)) {
    SAY(error, room, options->weights_path, " cannot be mapped: memory is short");
    code = DANCE_BAD_WEIGHTS;
  }
  close(fd);
  return code;
}

static int verify(const weight_set *weights, char *error, size_t room) {
  unsigned char digest[DIGEST_BYTES];
  if (!tree_digest(weights->store, dance_the_program.store_bytes, digest)) return DANCE_NO_MEMORY;
  if (!memcmp(digest, dance_the_program.digest, DIGEST_BYTES)) return DANCE_OK;
  SAY(error, room, dance_the_program.store ? "what this library holds of weights" : "the file of weights", " is damaged, or "
      "another network's: its hash is not the one that this library was built with; fetch or build the artifact again");
  return DANCE_BAD_WEIGHTS;
}

static int is_read_in_place(const weight_set *weights, const program_weight *weight) {
  return weight->encoding == PLAIN && weight->preparation == AS_STORED &&
         !((uintptr_t)(weights->store + weight->offset) % ALIGNMENT);
}

/* Pages of the file that were hashed or prepared are not needed: they need not stay in memory beside what is made of
 * them. What is read again comes back from the system's cache. */
static void release_pages(const weight_set *weights, uint64_t offset, uint64_t bytes) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)weights->store + offset;
  const uintptr_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
  if (weights->mapped && begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

static int larger_first(const void *one, const void *other) {
  const program_weight *first = &dance_the_program.weights[*(const int32_t *)one];
  const program_weight *second = &dance_the_program.weights[*(const int32_t *)other];
  return (first->stored < second->stored) - (first->stored > second->stored);
}

/* The largest first: while one is prepared, what it is made of lies in memory beside all that was prepared before. */
static int prepare_in_turn(weight_set *weights, int32_t *order) {
  const dance_program *program = &dance_the_program;
  int32_t count = 0;
  size_t at = 0;
  for (int32_t each = 0; each < program->weight_count; each++) {
    weights->tensors[each] = weights->store + program->weights[each].offset;
    if (is_read_in_place(weights, &program->weights[each])) continue;
    weights->tensors[each] = weights->prepared + at;
    at += rounded((size_t)program->weights[each].bytes);
    order[count++] = each;
  }
  qsort(order, (size_t)count, sizeof *order, larger_first);
  for (int32_t each = 0; each < count; each++) {
    const program_weight *weight = &program->weights[order[each]];
    void *to = (void *)weights->tensors[order[each]];
    if (!prepare_weight(weight, weights->store + weight->offset, to)) return DANCE_NO_MEMORY;
    release_pages(weights, weight->offset, weight->stored);
  }
  return DANCE_OK;
}

static int prepare_all(weight_set *weights) {
  int32_t *order = calloc((size_t)dance_the_program.weight_count + 1, sizeof *order);
  const int code = order ? prepare_in_turn(weights, order) : DANCE_NO_MEMORY;
  free(order);
  return code;
}

static int prepare(weight_set *weights) {
  const dance_program *program = &dance_the_program;
  size_t room = 0;
  for (int32_t each = 0; each < program->weight_count; each++)
    if (!is_read_in_place(weights, &program->weights[each])) room += rounded((size_t)program->weights[each].bytes);
  if (room) {
    void *memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return DANCE_NO_MEMORY;
    madvise(memory, room, MADV_HUGEPAGE);
    weights->prepared = memory;
    weights->prepared_bytes = room;
  }
  return prepare_all(weights);
}

int load_weights(weight_set **found, const dance_options *options, char *error, size_t room) {
  const dance_program *program = &dance_the_program;
  weight_set *weights = calloc(1, sizeof *weights);
  int code = DANCE_OK;
  *found = weights;
  if (!weights) return DANCE_NO_MEMORY;
  atomic_store(&weights->users, 1);
  weights->tensors = calloc((size_t)program->weight_count + 1, sizeof *weights->tensors);
  if (!weights->tensors) return DANCE_NO_MEMORY;
  weights->store = program->store;
  if (!program->store && program->store_bytes) code = open_store(weights, options, error, room);
  if (!code && !options->verified) code = verify(weights, error, room);
  if (!code) release_pages(weights, 0, program->store_bytes);
  return code ? code : prepare(weights);
}
